package image

import (
	"strings"
	"testing"
)

// TestRecogniseHeads: contents that qemu-img does not make are told from raw disks by how they begin. What only looks
// a little like them is a disk.
func TestRecogniseHeads(t *testing.T) {
	for head, want := range map[string]Foreign{
		"VDSF\x01\x00\x00\x00":             {"a stream of 'vdisk send'", "", "receive"},
		"rbd diff v1\nt":                   {"a difference in the format of 'rbd export-diff'", "", "import-diff"},
		"rbd image v2\n":                   {"an image in a format of 'rbd export'", "", ""},
		"BZh91AY&SY":                       {"bzip2", "", ""},
		"\x5d\x00\x00\x80\x00" + ff(8):     {"lzma", "", ""},
		"\x5d\x00\x00\x00\x04" + ff(8):     {"lzma", "", ""},
		"\x5d\x00\x00\x80\x00" + ff(7):     {},
		"\x5d\x00\x00\x80\x00\x00" + ff(8): {},
		"rbd diff":                         {},
		"VDS":                              {},
		"":                                 {},
	} {
		if got, is := Recognise([]byte(head), nil); got != want || is != (want.What != "") {
			t.Errorf("%q is recognised as %+v (%v), want %+v", head, got, is, want)
		}
	}
}

func ff(n int) string { return strings.Repeat("\xff", n) }
