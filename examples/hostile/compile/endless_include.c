#include "endless_include.c"
#include "endless_include.c"
