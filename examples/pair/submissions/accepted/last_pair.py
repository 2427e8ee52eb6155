"""The last pair, its numbers in the other order: right as well."""

count, wanted = map(int, input().split())
weights = list(map(int, input().split()))
pairs = [
    (b + 1, a + 1)
    for a in range(count)
    for b in range(a + 1, count)
    if weights[a] + weights[b] == wanted
]
print(*(pairs[-1] if pairs else ["none"]))
