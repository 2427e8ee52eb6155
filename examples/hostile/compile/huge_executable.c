char everything[1 << 30] = {1};
int main(void) { return everything[0]; }
