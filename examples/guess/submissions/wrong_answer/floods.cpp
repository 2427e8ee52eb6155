// Prints guesses and reads nothing: it goes on writing when the warden has gone.
#include <cstdio>

int main() {
    while (true) std::puts("1");
}
