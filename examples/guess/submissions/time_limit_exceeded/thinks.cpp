// Thinks for ever about the first guess.
#include <iostream>

int main() {
    long most;
    std::cin >> most;
    for (volatile unsigned long thoughts = 0;; thoughts++) {
    }
}
