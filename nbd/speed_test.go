package nbd

import (
	"io"
	"testing"
	"time"
)

// A request allocates nothing once the connection has warmed up, on any goroutine.
func TestNoAllocations(t *testing.T) {
	for _, x := range []struct {
		name string
		typ  uint16
		n    int
	}{
		{"inline read", cmdRead, 4096},
		{"inline write", cmdWrite, 4096},
		{"worker's read", cmdRead, 128 << 10},
		{"worker's write", cmdWrite, 128 << 10},
	} {
		t.Run(x.name, func(t *testing.T) {
			d := newRAM(1 << 20)
			c := dial(t, exportMap{"disk": {Device: struct{ Device }{d}}}, Options{})
			c.open("disk", true)
			req := []byte(reqBytes(0, x.typ, 1, 0, uint32(x.n)))
			reply := make([]byte, simpleLen)
			if x.typ == cmdWrite {
				req = append(req, make([]byte, x.n)...)
			}
			if x.typ == cmdRead {
				reply = make([]byte, chunkLen+8+x.n)
			}
			const depth = 8
			round := func() {
				for range depth {
					if _, err := c.Write(req); err != nil {
						t.Error(err)
					}
				}
				for range depth {
					if _, err := io.ReadFull(c, reply); err != nil {
						t.Error(err)
					}
				}
			}
			for range 50 {
				round()
			}
			// A collection empties the pools now and then, so a little is allowed.
			if n := testing.AllocsPerRun(300, round) / depth; n > allocsAllowed {
				t.Errorf("%.2f allocations a request", n)
			}
		})
	}
}

func TestPace(t *testing.T) {
	const fast, slow = quick / 4, 10 * quick
	var p pace
	for range 1000 {
		if !p.inline() {
			t.Fatal("a quick device is not called by the receiver")
		}
		p.observe(fast)
	}
	p.observe(time.Second)
	if !p.inline() {
		t.Error("one slow call is taken for a slow device")
	}
	n := 0
	for ; p.inline(); n++ {
		p.observe(slow)
	}
	if n > 8 {
		t.Errorf("%d slow calls until the device counts as slow", n)
	}
	inline := 0
	for range 10_000 {
		if p.inline() {
			inline++
			p.observe(slow)
		}
	}
	if inline == 0 || inline > 30 {
		t.Errorf("%d of 10000 requests probe a slow device", inline)
	}
	n = 0
	for ; p.mean > quick && n < 10_000; n++ {
		if p.inline() {
			p.observe(fast)
		}
	}
	if n > 3000 {
		t.Errorf("%d requests until a quick device counts as quick again", n)
	}
}

// A device that becomes slow gets several requests at once, from workers.
func TestSlowDeviceInParallel(t *testing.T) {
	d := newRAM(1 << 20)
	d.onRead = func([]byte, int64) error { time.Sleep(2 * time.Millisecond); return nil }
	c := dial(t, serveRAM(d), Options{Workers: 32})
	c.open("disk", false)
	began := time.Now()
	const n = 640
	go func() {
		for range n {
			if _, err := c.Write([]byte(reqBytes(0, cmdRead, 1, 0, 512))); err != nil {
				t.Error(err)
			}
		}
	}()
	for range n {
		c.reply(512)
	}
	if took, alone := time.Since(began), n*2*time.Millisecond; took > alone/3 {
		t.Errorf("%v, one after the other is %v", took, alone)
	}
}
