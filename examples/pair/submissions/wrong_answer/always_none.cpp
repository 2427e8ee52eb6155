// Never finds any.
#include <iostream>

int main() { std::cout << "none\n"; }
