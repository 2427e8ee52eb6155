// 8 GiB of zeros that the program asks for before it begins.
#include <stdio.h>

static volatile char room[8LL << 30];

int main(void) {
    for (long long i = 0; i < (long long)sizeof room; i += 4096) room[i] = 1;
    long long a, b;
    while (scanf("%lld %lld", &a, &b) == 2) printf("%lld\n", a < b ? b - a : a - b);
    return 0;
}
