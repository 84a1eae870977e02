package nbd_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/vdisk/vdisk/nbd"
)

// memory is a disk in memory.
type memory struct {
	mu   sync.RWMutex
	data []byte
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return copy(p, m.data[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) WriteZeroes(off, length int64, _ bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.data[off:][:length])
	return nil
}

func (m *memory) Discard(off, length int64) error { return nil }
func (m *memory) Flush() error                    { return nil }
func (m *memory) Size() int64                     { return int64(len(m.data)) }

// one exports a device under one name.
type one struct {
	name string
	dev  nbd.Device
}

func (o one) List() ([]string, error) { return []string{o.name}, nil }

func (o one) Describe(name string) (nbd.Info, error) {
	if name != o.name {
		return nbd.Info{}, fs.ErrNotExist
	}
	return nbd.Info{Name: name, Size: o.dev.Size()}, nil
}

func (o one) Open(name string) (*nbd.Export, error) {
	if name != o.name {
		return nil, fs.ErrNotExist
	}
	return &nbd.Export{Name: name, Device: o.dev}, nil
}

// Serve a disk in memory on a Unix socket. A client is, for example, nbdinfo 'nbd+unix:///ram?socket=PATH'.
func Example() {
	dir, err := os.MkdirTemp("", "nbd-example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "nbd.sock"))
	if err != nil {
		log.Fatal(err)
	}
	server := nbd.New(one{"ram", &memory{data: make([]byte, 1<<20)}}, nbd.Options{})
	served := make(chan error)
	go func() { served <- server.Serve(context.Background(), l) }()

	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	greeting := make([]byte, 16)
	if _, err := client.Read(greeting); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", greeting)
	client.Close()

	if err := server.Shutdown(context.Background()); err != nil {
		log.Fatal(err)
	}
	fmt.Println(errors.Is(<-served, nbd.ErrServerClosed))
	// Output:
	// NBDMAGICIHAVEOPT
	// true
}
