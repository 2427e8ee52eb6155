#include <stdio.h>

int main(void) {
    for (;;) fputs("no\n", stderr);
}
