"""One after the other; input() fails when the warden has had enough, which is no run-time error."""

most = int(input().split()[0])
for guess in range(1, most + 1):
    print(guess, flush=True)
    if input() == "correct":
        break
