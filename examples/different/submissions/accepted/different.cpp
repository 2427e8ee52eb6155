// Reads pairs until the end and prints how far apart they are.
#include <cstdint>
#include <iostream>

int main() {
    std::ios::sync_with_stdio(false);
    std::cin.tie(nullptr);
    std::int64_t a, b;
    while (std::cin >> a >> b) {
        // the distance of two 64-bit integers needs 64 bits without a sign
        std::uint64_t low = a < b ? a : b, high = a < b ? b : a;
        std::cout << high - low << '\n';
    }
}
