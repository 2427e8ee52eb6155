// Touches 1 GiB, and would give the right answers after that.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    for (int i = 0; i < 1024; i++) {
        char *block = malloc(1 << 20);
        if (block) memset(block, i, 1 << 20);
        __asm__ volatile("" : : "r"(block) : "memory");
    }
    long long a, b;
    while (scanf("%lld %lld", &a, &b) == 2) printf("%lld\n", a < b ? b - a : a - b);
    return 0;
}
