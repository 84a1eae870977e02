package cow_test

import (
	"fmt"
	"log"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/vdisk/vdisk/cow"
)

// Make a store with a volume, write to it, and take a snapshot. The snapshot keeps the volume's content.
func Example() {
	dir, err := os.MkdirTemp("", "vdisk-example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	dir = filepath.Join(dir, "store")
	if err := cow.Create(dir); err != nil {
		log.Fatal(err)
	}
	store, err := cow.Open(dir, cow.Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := store.CreateVolume("db", cow.VolumeOptions{Size: 1 << 30}); err != nil {
		log.Fatal(err)
	}

	disk, err := store.OpenDevice(cow.Ref{Volume: "db"}, false)
	if err != nil {
		log.Fatal(err)
	}
	write := func(text string) {
		if _, err := disk.WriteAt([]byte(text), 0); err != nil {
			log.Fatal(err)
		}
		if err := disk.Flush(); err != nil { // durable from here on
			log.Fatal(err)
		}
	}
	write("one")
	if err := store.Snapshot(cow.Ref{Volume: "db", Snapshot: "monday"}); err != nil {
		log.Fatal(err)
	}
	write("two")

	for _, ref := range []cow.Ref{{Volume: "db"}, {Volume: "db", Snapshot: "monday"}} {
		d, err := store.OpenDevice(ref, true)
		if err != nil {
			log.Fatal(err)
		}
		p := make([]byte, 3)
		if _, err := d.ReadAt(p, 0); err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%v: %s\n", ref, p)
		if err := d.Close(); err != nil {
			log.Fatal(err)
		}
	}
	if err := disk.Close(); err != nil {
		log.Fatal(err)
	}
	if err := store.Close(); err != nil {
		log.Fatal(err)
	}
	// Output:
	// db: two
	// db@monday: one
}
