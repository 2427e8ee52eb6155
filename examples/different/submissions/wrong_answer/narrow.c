// 32 bits are not enough.
#include <stdio.h>

int main(void) {
    long long a, b;
    while (scanf("%lld %lld", &a, &b) == 2) {
        int distance = (int)a - (int)b;
        printf("%d\n", distance < 0 ? -distance : distance);
    }
    return 0;
}
