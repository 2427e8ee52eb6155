#include <stdio.h>
#include <stdlib.h>

int main(void) {
    static char block[1 << 20];
    for (int i = 0; i < (int)sizeof block; i++) block[i] = (char)i;
    FILE *file = fopen("big", "w");
    if (!file) abort();
    while (fwrite(block, sizeof block, 1, file) == 1 && fflush(file) == 0) {}
    abort();
}
