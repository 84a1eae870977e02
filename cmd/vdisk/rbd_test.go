package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"

	"github.com/rogpeppe/go-internal/testscript"
)

// cmdRBDApply applies a difference to a raw image, as the published format says (doc/dev/rbd-diff.rst of Ceph), and not
// as the program's own reader does. It checks the names of the snapshots; "-" is none: rbdapply DIFF IMAGE FROM TO
func cmdRBDApply(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: rbdapply DIFF IMAGE FROM TO")
	}
	diff, err := os.ReadFile(ts.MkAbs(args[0]))
	ts.Check(err)
	image, err := os.ReadFile(ts.MkAbs(args[1]))
	if !os.IsNotExist(err) {
		ts.Check(err)
	}
	image, names, err := applyRBD(diff, image)
	ts.Check(err)
	if want := [2]string{args[2], args[3]}; names != want {
		ts.Fatalf("it goes from %q to %q, not from %q to %q", names[0], names[1], want[0], want[1])
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), image, 0o600))
}

func applyRBD(diff, image []byte) (out []byte, names [2]string, err error) {
	names = [2]string{"-", "-"}
	header := []byte("rbd diff v1\n")
	if !bytes.HasPrefix(diff, header) {
		return nil, names, fmt.Errorf("it begins with %q", diff[:min(len(diff), 12)])
	}
	diff = diff[len(header):]
	take := func(n uint64) []byte {
		if n > uint64(len(diff)) {
			panic("cut off")
		}
		b := diff[:n]
		diff = diff[n:]
		return b
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	for sized := false; ; {
		switch tag := take(1)[0]; tag {
		case 'f':
			names[0] = string(take(uint64(binary.LittleEndian.Uint32(take(4)))))
		case 't':
			names[1] = string(take(uint64(binary.LittleEndian.Uint32(take(4)))))
		case 's':
			size := binary.LittleEndian.Uint64(take(8))
			image = append(image, make([]byte, size)...)[:size]
			sized = true
		case 'w', 'z':
			off, n := binary.LittleEndian.Uint64(take(8)), binary.LittleEndian.Uint64(take(8))
			if !sized {
				return nil, names, fmt.Errorf("data before the size")
			}
			if to := image[off : off+n]; tag == 'z' {
				clear(to)
			} else {
				copy(to, take(n))
			}
		case 'e':
			if len(diff) > 0 {
				return nil, names, fmt.Errorf("%d bytes behind the end", len(diff))
			}
			return image, names, nil
		default:
			return nil, names, fmt.Errorf("a record %q", tag)
		}
	}
}
