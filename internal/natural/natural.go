// Package natural orders texts as people do.
package natural

import (
	"cmp"
	"strings"
)

// Compare compares texts as people do: vm2 is before vm10.
func Compare(x, y string) int {
	a, b := x, y
	for a != "" && b != "" {
		m, n := leadingDigits(a), leadingDigits(b)
		if m == 0 || n == 0 {
			if a[0] != b[0] {
				return cmp.Compare(a[0], b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		d, e := strings.TrimLeft(a[:m], "0"), strings.TrimLeft(b[:n], "0")
		if order := cmp.Or(cmp.Compare(len(d), len(e)), cmp.Compare(d, e)); order != 0 {
			return order
		}
		a, b = a[m:], b[n:]
	}
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(x, y)) // "1" and "01" differ, too
}

func leadingDigits(text string) (n int) {
	for n < len(text) && '0' <= text[n] && text[n] <= '9' {
		n++
	}
	return n
}
