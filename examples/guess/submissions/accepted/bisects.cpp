// Halves what is left.
#include <iostream>
#include <string>

int main() {
    long low = 1, high, tries;
    std::cin >> high >> tries;
    while (true) {
        long middle = low + (high - low) / 2;
        std::cout << middle << std::endl;
        std::string answer;
        std::cin >> answer;
        if (answer == "correct") return 0;
        if (answer == "higher")
            low = middle + 1;
        else
            high = middle - 1;
    }
}
