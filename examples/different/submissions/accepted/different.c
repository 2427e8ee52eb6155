#include <inttypes.h>
#include <stdio.h>

int main(void) {
    int64_t a, b;
    while (scanf("%" SCNd64 " %" SCNd64, &a, &b) == 2) {
        uint64_t distance = a < b ? (uint64_t)b - (uint64_t)a : (uint64_t)a - (uint64_t)b;
        printf("%" PRIu64 "\n", distance);
    }
    return 0;
}
