# Prints and prints.
while True:
    print("0\n" * 10000)
