// The first pair that it meets.
#include <iostream>
#include <vector>

int main() {
    int count, wanted;
    std::cin >> count >> wanted;
    std::vector<int> weights(count);
    for (int &weight : weights) std::cin >> weight;
    for (int a = 0; a < count; a++)
        for (int b = a + 1; b < count; b++)
            if (weights[a] + weights[b] == wanted) {
                std::cout << a + 1 << ' ' << b + 1 << '\n';
                return 0;
            }
    std::cout << "none\n";
}
