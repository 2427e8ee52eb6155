// Prints what is no guess, and fails at once after that.
#include <iostream>

int main() {
    std::cout << "hello" << std::endl;
    return 1;
}
