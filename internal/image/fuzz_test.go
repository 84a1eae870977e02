package image

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// FuzzDescriptor reads arbitrary descriptors. Each file that qemu would open, by a model of its way of reading them, is one
// that check has seen.
func FuzzDescriptor(f *testing.F) {
	f.Add([]byte("RW 8 FLAT \"flat\" 0\n"))
	f.Add([]byte("# x\nRW\n8\vFLAT\r\n\"a\nRW 9 SPARSE \"b"))
	f.Add([]byte("RW 8 RW 9 FLAT \"/x\" 0\nRW +8FLAT \"y\""))
	f.Add([]byte("RW 8\nRW 9 \"a\" RW -1 Z\"q\"\x00RW 7 FLAT \"z\""))
	f.Add([]byte("RDONLY 8 FLAT \"flat\" 0\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		seen := make(map[string]bool)
		extents, err := extentsOf(text)
		if err != nil {
			return // it is refused
		}
		for _, e := range extents {
			seen[e.name] = true
		}
		for _, name := range qemuExtents(text) {
			if !seen[name] {
				t.Errorf("qemu would open %q; seen: %v", name, seen)
			}
		}
	})
}

// scanner is as much of sscanf(3) as qemu uses.
type scanner struct{ rest []byte }

func isBlank(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' }

func (s *scanner) blanks() {
	for len(s.rest) > 0 && isBlank(s.rest[0]) {
		s.rest = s.rest[1:]
	}
}

// word is %s with a width, number %lld, and name \"%511[^\n\r\"].
func (s *scanner) word(width int) string {
	s.blanks()
	n := 0
	for n < len(s.rest) && n < width && !isBlank(s.rest[n]) {
		n++
	}
	w := s.rest[:n]
	s.rest = s.rest[n:]
	return string(w)
}

func (s *scanner) number() bool {
	s.blanks()
	if len(s.rest) > 0 && (s.rest[0] == '+' || s.rest[0] == '-') {
		s.rest = s.rest[1:]
	}
	n := 0
	for n < len(s.rest) && s.rest[n] >= '0' && s.rest[n] <= '9' {
		n++
	}
	s.rest = s.rest[n:]
	return n > 0
}

func (s *scanner) name() string {
	s.blanks()
	if len(s.rest) == 0 || s.rest[0] != '"' {
		return ""
	}
	s.rest = s.rest[1:]
	n := bytes.IndexAny(s.rest, "\n\r\"")
	if n < 0 {
		n = len(s.rest)
	}
	return string(s.rest[:min(n, 511)])
}

// kinds are the types of extents that qemu opens.
var kinds = []string{"FLAT", "SPARSE", "VMFS", "VMFSSPARSE", "SESPARSE"}

// qemuExtents returns the files that vmdk_parse_extents of qemu opens: sscanf is applied to each line, and runs on into
// the next ones.
func qemuExtents(text []byte) (names []string) {
	text, _, _ = bytes.Cut(text, []byte{0})
	for len(text) > 0 {
		s := scanner{text}
		if access := s.word(9); access == "RW" && s.number() && slices.Contains(kinds, s.word(10)) {
			if name := s.name(); name != "" && len(name) < 511 {
				names = append(names, name)
			}
		}
		_, text, _ = bytes.Cut(text, []byte{'\n'})
	}
	return names
}

// FuzzReferences looks at arbitrary files as images of each format. Memory is bounded, and what is no image is no panic.
func FuzzReferences(f *testing.F) {
	for _, m := range magics {
		f.Add(append([]byte(strings.Repeat("\x00", m.at)), m.text...))
	}
	f.Add([]byte("QFI\xfb\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x40\xff\xff\xff\xff"))
	f.Add([]byte("KDMV\x01\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
	path := filepath.Join(f.TempDir(), "image")
	f.Fuzz(func(t *testing.T, p []byte) {
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for _, format := range Formats {
			refs, err := references(file, format.Name)
			if err == nil && format.Name == "qcow2" && len(p) >= 16 && be.Uint64(p[8:]) != 0 && len(refs) == 0 {
				t.Error("a backing file was overlooked")
			}
		}
		if f, is := Recognise(p[:min(len(p), HeadSize)], p[max(0, len(p)-FootSize):]); is && f.What == "" {
			t.Errorf("%q is recognised as nothing", p)
		}
	})
}

// FuzzMapped reads arbitrary output of qemu-img map.
func FuzzMapped(f *testing.F) {
	f.Add([]byte("Offset          Length          Mapped to       File\n0               0x400000        0x10000         /a b/g-s001.vmdk\n"))
	f.Add([]byte(`[{ "start": 0, "length": 4096, "depth": 0, "zero": false, "data": true, "offset": 327680}]`))
	f.Fuzz(func(t *testing.T, p []byte) {
		end, err := mappedJSON(bytes.NewReader(p))
		if err == nil && end != 0 && !bytes.Contains(bytes.ToLower(p), []byte("offset")) {
			t.Errorf("%d of %q", end, p)
		}
		ends, err := mappedText(bytes.NewReader(p))
		for path := range ends {
			if err == nil && !bytes.Contains(p, []byte(path)) {
				t.Errorf("%q of %q", path, p)
			}
		}
	})
}
