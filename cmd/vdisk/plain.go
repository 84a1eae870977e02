package main

import (
	"fmt"
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// plainWriter writes text for people, and JSON. Much of it comes from elsewhere: names that processes give themselves,
// mount points, the error texts of another owner. Characters that could move a terminal's cursor or change what it
// shows are written as \uXXXX, which means the same in JSON, and bytes that are not text as \xXX. Newlines and tabs are
// left to the caller: see cell.
type plainWriter struct{ w io.Writer }

// Write writes all of b or fails.
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

// rawOf returns the underlying stream, for content that is not text.
func rawOf(w io.Writer) io.Writer {
	if p, ok := w.(plainWriter); ok {
		return p.w
	}
	return w
}

// cell escapes a text that must stay in its place in a line, including newlines and tabs.
func cell(text string) string { return escape(text, "") }

// isPlain reports whether b needs no escaping, which is the common case.
func isPlain(b []byte) bool {
	for _, c := range b {
		if (c < ' ' || c > '~') && c != '\n' && c != '\t' {
			return false
		}
	}
	return true
}

// escape escapes all characters that are neither printable nor in keep.
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
