"""Finds the number, and says something more."""

low, high = 1, int(input().split()[0])
answer = ""
while answer != "correct":
    middle = (low + high) // 2
    print(middle, flush=True)
    answer = input()
    if answer == "higher":
        low = middle + 1
    else:
        high = middle - 1
print("found it")
