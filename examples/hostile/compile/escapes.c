#error "[2J]0;owned[31mall your terminal\n"
int main(void) { return 0; }
