package main

import (
	"errors"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/nbdclient"
)

// disk is where cmdPut writes to.
type disk interface {
	WriteAt(p []byte, off int64) (int, error)
	discard(off, n int64) error
	Close() error
}

type served struct{ *nbdclient.Client }

func (d served) discard(off, n int64) error { return d.Trim(off, n, 0) }
func (d served) Close() error               { return errors.Join(d.Sync(), d.Client.Close()) }

type opened struct {
	*cow.Device
	s *cow.Store
}

func (d opened) discard(off, n int64) error { return d.Discard(off, n) }
func (d opened) Close() error               { return errors.Join(d.Flush(), d.Device.Close(), d.s.Close()) }

// cmdPut writes to a volume, over NBD if a socket is named, and else in the store, which must have no owner. The seed
// "zero" is zeros, and "hole" discards: put [SOCKET] VOL OFFSET:LENGTH:SEED...
func cmdPut(ts *testscript.TestScript, neg bool, args []string) {
	socket := ""
	if len(args) > 0 && strings.HasSuffix(args[0], ".sock") {
		socket, args = ts.MkAbs(args[0]), args[1:]
	}
	if neg || len(args) < 1 {
		ts.Fatalf("usage: put [SOCKET] VOL OFFSET:LENGTH:SEED...")
	}
	var d disk
	if socket != "" {
		c, err := nbdclient.Dial(socket, args[0])
		ts.Check(err)
		d = served{c}
	} else {
		s, err := cow.Open(ts.Getenv("VDISK_STORE"), cow.Options{LockTimeout: 5 * time.Second})
		ts.Check(err)
		dev, err := s.OpenDevice(cow.Ref{Volume: args[0]}, false)
		ts.Check(err)
		d = opened{dev, s}
	}
	for _, run := range args[1:] {
		fields := strings.Split(run, ":")
		if len(fields) != 3 {
			ts.Fatalf("%q: OFFSET:LENGTH:SEED is needed", run)
		}
		off, err := parseSize(fields[0])
		ts.Check(err)
		n, err := parseSize(fields[1])
		ts.Check(err)
		if fields[2] == "hole" {
			ts.Check(d.discard(off, n))
			continue
		}
		p := make([]byte, n)
		if fields[2] != "zero" {
			p = noise(fields[2], int(n))
		}
		_, err = d.WriteAt(p, off)
		ts.Check(err)
	}
	ts.Check(d.Close())
}
