def distance(a, b):
    return a - b if a > b else b - a
