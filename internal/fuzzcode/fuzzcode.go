// Package fuzzcode reads the input of a fuzz target as a program: the choices of a test, one after the other.
package fuzzcode

// Code is what is left of a program. It reads as zeros behind its end.
type Code struct{ B []byte }

// Byte takes the next byte.
func (c *Code) Byte() byte {
	if len(c.B) == 0 {
		return 0
	}
	b := c.B[0]
	c.B = c.B[1:]
	return b
}

// U16 takes the next two bytes.
func (c *Code) U16() int { return int(c.Byte())<<8 | int(c.Byte()) }

// Text takes the next n bytes, or what is left.
func (c *Code) Text(n int) string {
	n = min(n, len(c.B))
	s := string(c.B[:n])
	c.B = c.B[n:]
	return s
}
