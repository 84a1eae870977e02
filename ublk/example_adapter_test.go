package ublk_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"

	"github.com/vdisk/vdisk/ublk"
)

// A file as a disk. os.File has ReadAt, WriteAt and Sync; sixteen requests may wait for it at once.
func ExampleNewReaderWriterAt() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	defer cancel()
	f, err := os.OpenFile("disk.img", os.O_RDWR, 0)
	if err != nil {
		log.Print(err)
		return
	}
	defer f.Close()
	a := ublk.NewReaderWriterAt(f, 16)
	defer a.Close() // after the device is gone
	d, err := ublk.Create(ctx, ublk.Options{Size: 1 << 30, VolatileCache: true, FUA: true}, a)
	if err != nil {
		log.Print(err)
		return
	}
	fmt.Println("serving", d.Path())
	select {
	case <-ctx.Done():
		err = d.Close(context.Background())
	case <-d.Done():
		err = d.Err()
	}
	if err != nil {
		log.Print(err)
	}
}
