// Dies by SIGABRT at the first negative milestone.
#include <assert.h>
#include <stdio.h>

int main(void) {
    long long a, b;
    while (scanf("%lld %lld", &a, &b) == 2) {
        assert(a >= 0 && b >= 0);
        printf("%lld\n", a < b ? b - a : a - b);
    }
    return 0;
}
