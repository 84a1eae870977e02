package nbd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// observedRAM notes what it is told of requests.
type observedRAM struct {
	*ramDevice
	mu   sync.Mutex
	seen []string
}

func (d *observedRAM) Observe(op Op, length int64, took time.Duration, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if took <= 0 || took > time.Minute {
		d.seen = append(d.seen, fmt.Sprint("took ", took))
	}
	d.seen = append(d.seen, fmt.Sprintf("%d of %d: %v", op, length, err))
	if errors.Is(err, syscall.EBADMSG) {
		panic("an observer that fails")
	}
}

// TestObserve asks for everything that a device does, in the ways in which a server does it: each request is observed
// once, with its outcome, and nothing else is. The observer's own failure ends nothing.
func TestObserve(t *testing.T) {
	d := &observedRAM{ramDevice: newRAM(64 << 20)}
	bad := error(syscall.EBADMSG)
	d.onRead = func(_ []byte, off int64) error {
		if off == 7<<20 {
			return bad
		}
		return nil
	}
	d.onWrite = func(_ []byte, off int64) error {
		if off == 7<<20 {
			return syscall.ENOSPC
		}
		return nil
	}
	c := dial(t, exportMap{"disk": {Device: d, Name: "disk"}}, Options{})
	c.open("disk", true)
	const large = 1 << 20
	var want []string
	ask := func(op Op, length int, outcome error, errno uint32, flags, typ uint16, off uint64, payload ...string) {
		t.Helper()
		n := 0
		if typ == cmdRead && errno == 0 {
			n = length
		}
		c.request(flags, typ, 77, off, uint32(length), payload...)
		if r := c.reply(n); r.errno != errno {
			t.Fatalf("command %d, flags %d: %+v", typ, flags, r)
		}
		if op != none {
			want = append(want, fmt.Sprintf("%d of %d: %v", op, length, outcome))
		}
	}
	payload := strings.Repeat("x", large)
	ask(OpWrite, 4096, nil, 0, 0, cmdWrite, 0, payload[:4096])
	ask(OpWrite, 4096, nil, 0, cmdFlagFUA, cmdWrite, 0, payload[:4096])
	ask(OpWrite, large, nil, 0, 0, cmdWrite, 0, payload)
	ask(OpWrite, large, nil, 0, cmdFlagFUA, cmdWrite, 0, payload)
	ask(OpWrite, 4096, syscall.ENOSPC, errnoNoSpace, 0, cmdWrite, 7<<20, payload[:4096])
	ask(OpWrite, large, syscall.ENOSPC, errnoNoSpace, 0, cmdWrite, 7<<20, payload)
	ask(OpRead, 4096, nil, 0, 0, cmdRead, 0)
	ask(OpRead, large, nil, 0, cmdFlagDF, cmdRead, 0)
	ask(OpRead, 4096, bad, errnoIO, 0, cmdRead, 7<<20)
	ask(OpRead, large, bad, errnoIO, cmdFlagDF, cmdRead, 7<<20)
	ask(OpFlush, 0, nil, 0, 0, cmdFlush, 0)
	ask(OpTrim, large, nil, 0, 0, cmdTrim, 0)
	ask(OpTrim, large, nil, 0, cmdFlagFUA, cmdTrim, 0)
	ask(OpWriteZeroes, large, nil, 0, 0, cmdWriteZeroes, 0)
	ask(none, 4096, nil, errnoInval, 0, cmdRead, 64<<20)
	ask(none, 4096, nil, 0, 0, cmdCache, 0)
	ask(none, 0, nil, 0, 0, cmdRead, 0)
	c.disconnect()
	if !slices.Equal(d.seen, want) {
		t.Errorf("observed:\n%s\nwanted:\n%s", strings.Join(d.seen, "\n"), strings.Join(want, "\n"))
	}
}

const none Op = 255
