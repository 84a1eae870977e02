package web

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/owner"
	"github.com/vdisk/vdisk/internal/storage"
)

// TestBrowserLarge looks at the page of a store that is large, nearly full and damaged, as far as the page can tell: 'make
// web-test'.
func TestBrowserLarge(t *testing.T) {
	if os.Getenv("VDISK_WEB_TEST") == "" {
		t.Skip("make web-test runs this")
	}
	f := largeStore(t)
	l, _, err := Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := f.options()
	o.now, o.tick, o.usageWait = time.Now, nil, 0
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, o) }()
	b := startChromium(t)
	b.shape(1280, 900, "light")
	b.open(URL(l))
	var n []int
	b.eval(`[".tree tbody tr", ".map i", "#journal .bad"].map((s) => document.querySelectorAll(s).length)`, &n)
	if n[0] != shownRows || n[1] < maxCells/2 || n[1] > maxCells || n[2] != 2 {
		t.Errorf("%d rows, %d cells, %d bad events", n[0], n[1], n[2])
	}
	// Most rows do not fit in a picture.
	b.eval(`document.querySelectorAll(".tree tbody tr:nth-child(n+36), #journal tr:nth-child(n+12)").forEach((e) => e.remove())`, new(any))
	b.shoot("large-light")
	b.shape(1280, 900, "dark")
	b.shoot("large-dark")
	b.shape(390, 844, "light")
	b.shoot("large-narrow")
	var wider bool
	if b.eval(`document.documentElement.scrollWidth > innerWidth`, &wider); wider {
		t.Error("the page is wider than a narrow window")
	}
	b.clean(URL(l))
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// largeStore returns a store with thousands of chunks and volumes, a clone of a clone many times over, and troubles.
func largeStore(t *testing.T) *fake {
	f := newFake(t)
	r := &f.reading
	r.Started, r.Served, r.Waiting, r.Clients = time.Now().Add(-50*time.Hour), 41, 1, 180
	r.Info.Fill = &cow.Fill{Bytes: 37 << 35, FullAt: 40 << 35}
	r.Info.FillLevels = []int{80, 90, 95}
	r.Info.Scrub.Now = &cow.ScrubRun{}
	r.Counters.DamagedPlaces, r.Counters.Paced = 3, true
	const size = 64 << 20
	for i := range uint32(7000) {
		c := cow.ChunkInfo{Slot: i, Seq: uint64(i) + 1, Kind: cow.ChunkFull, FileBytes: size, RecordBytes: size, LiveBytes: size - size*int64(i*i%97)/110}
		switch {
		case i == 4711:
			c.Kind = cow.ChunkDamaged
		case i == 2500:
			c.Kind = cow.ChunkCleaning
		case i > 6990:
			c.Kind, c.LiveBytes = cow.ChunkOpen, size/4
		case i%700 < 20:
			c.Kind, c.LiveBytes = cow.ChunkDead, 0
		}
		f.chunks = append(f.chunks, c)
		r.Info.Chunks, r.Info.LiveBytes, r.Counters.FileBytes = r.Info.Chunks+1, r.Info.LiveBytes+c.LiveBytes, r.Counters.FileBytes+size
	}
	r.Info.Volumes, r.Info.Snapshots = 3020, 9060
	from := ""
	for i := range 20 { // deeper than the page draws
		name := fmt.Sprintf("chain%d", i)
		f.volumes = append(f.volumes, volume(name, from, "base"))
		from = name + "@base"
	}
	for i := range 3000 {
		v := volume(fmt.Sprintf("vm%04d-of-a-customer-with-a-long-name-%d", i, i), "", "daily", "weekly", "monthly")
		v.Created, v.Size = time.Now(), 40<<30
		v.Devices = []owner.Device{{Ref: cow.Ref{Volume: v.Name}, Path: fmt.Sprintf("/dev/ublkb%d", i)}}
		f.volumes = append(f.volumes, v)
		f.usage = append(f.usage, cow.Usage{Ref: cow.Ref{Volume: v.Name}, Mapped: 9 << 30, Referenced: int64(4+i%7) << 30, Exclusive: int64(i%4) << 30, Shared: int64(4+i%7-i%4) << 30, Used: int64(i%9) << 30})
	}
	in, err := storage.OpenFolder(f.dir, true)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	log := journal.New(in, slog.New(slog.DiscardHandler))
	for i := range 300 {
		log.Add(journal.Entry{Kind: "snapshot", Names: []string{f.volumes[i].Name + "@daily", "a@daily", "b@daily", "c@daily", "d@daily", "e@daily"}, By: journal.Here("vdisk snapshot")})
	}
	log.Add(journal.Entry{Kind: "damage", Names: []string{"chain3@base"}, Error: "record at 17408 of chunk 00001267: wrong checksum", Details: map[string]any{"where": "chunk 00001267"}})
	log.Add(journal.Entry{Kind: "export", Phase: journal.End, Names: []string{"chain3"}, Error: errors.New("writing: no space left on device").Error(), By: journal.Here("vdisk export")})
	return f
}
