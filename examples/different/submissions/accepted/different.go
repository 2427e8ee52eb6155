package main

import (
	"bufio"
	"fmt"
	"os"
)

func main() {
	in := bufio.NewReader(os.Stdin)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for {
		var a, b int64
		if n, _ := fmt.Fscan(in, &a, &b); n != 2 {
			return
		}
		low, high := min64(a, b), max64(a, b)
		fmt.Fprintln(out, uint64(high)-uint64(low))
	}
}

func min64(a, b int64) int64 {
	if a < b {
		return a
	}
	return b
}

func max64(a, b int64) int64 {
	if a > b {
		return a
	}
	return b
}
