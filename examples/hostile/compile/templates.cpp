// Every level needs two of the next, each of its own type, so no limit on the depth helps.
template <typename Path, int Turn> struct Step;
template <int Depth, typename Path> struct Tree {
    static constexpr unsigned long long leaves =
        Tree<Depth - 1, Step<Path, 0>>::leaves + Tree<Depth - 1, Step<Path, 1>>::leaves;
};
template <typename Path> struct Tree<0, Path> { static constexpr unsigned long long leaves = 1; };
int main() { return Tree<60, int>::leaves != 0; }
