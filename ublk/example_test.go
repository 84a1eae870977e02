package ublk_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"

	"github.com/vdisk/vdisk/ublk"
)

// memory is a disk in RAM. Its queue calls it for one request at a time.
type memory []byte

func (m memory) ServeUBLK(r *ublk.Request) error {
	switch r.Op {
	case ublk.OpRead:
		copy(r.Buf, m[r.Offset:])
	case ublk.OpWrite:
		copy(m[r.Offset:], r.Buf)
	case ublk.OpDiscard, ublk.OpWriteZeroes:
		clear(m[r.Offset:][:r.Length])
	}
	return nil // a flush has nothing to do
}

// A RAM disk of 64 MiB that lasts until the program is interrupted.
func Example() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	disk := make(memory, 64<<20)
	d, err := ublk.Create(ctx, ublk.Options{Size: int64(len(disk)), Discard: true}, disk)
	if err != nil {
		log.Print(err) // says what is missing, and the way out
		return
	}
	fmt.Println("serving", d.Path())
	select {
	case <-ctx.Done():
	case <-d.Done(): // stopped from outside
	}
	if err := d.Close(context.Background()); err != nil {
		log.Print(err)
	}
}
