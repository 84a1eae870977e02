package main

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// plainWriter writes text to people, and JSON. Much of that comes from elsewhere: what processes call themselves, mount
// points, the text of another owner's errors. What could move a terminal's cursor or change what it shows is written as
// \uXXXX, which is the same in JSON, and bytes that are no text as \xXX. Lines and tabs are the caller's: see cell.
type plainWriter struct{ w io.Writer }

// Write writes all of p or fails.
func (p plainWriter) Write(b []byte) (int, error) {
	text := b
	if !isPlain(b) {
		text = []byte(escape(string(b), "\n\t"))
	}
	if _, err := p.w.Write(text); err != nil {
		return 0, err
	}
	return len(b), nil
}

// rawOf is the stream below, for what is not text.
func rawOf(w io.Writer) io.Writer {
	if p, ok := w.(plainWriter); ok {
		return p.w
	}
	return w
}

// cell is a text that is to stay within its place in a line.
func cell(text string) string { return escape(text, "") }

// isPlain reports whether there is nothing to do, which is the rule.
func isPlain(b []byte) bool {
	for _, c := range b {
		if (c < ' ' || c > '~') && c != '\n' && c != '\t' {
			return false
		}
	}
	return true
}

// escape writes out what is neither printable nor one of keep.
func escape(text, keep string) string {
	var s strings.Builder
	for len(text) > 0 {
		r, n := utf8.DecodeRuneInString(text)
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&s, `\x%02x`, text[0])
		case unicode.IsPrint(r) || strings.ContainsRune(keep, r):
			s.WriteString(text[:n])
		case r > 0xffff:
			fmt.Fprintf(&s, `\u%04x\u%04x`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
		default:
			fmt.Fprintf(&s, `\u%04x`, r)
		}
		text = text[n:]
	}
	return s.String()
}
