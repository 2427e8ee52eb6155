// Walks there, mile by mile.
#include <stdio.h>

int main(void) {
    long long a, b;
    while (scanf("%lld %lld", &a, &b) == 2) {
        unsigned long long miles = 0;
        for (volatile long long at = a < b ? a : b; at != (a < b ? b : a); at++) miles++;
        printf("%llu\n", miles);
    }
    return 0;
}
