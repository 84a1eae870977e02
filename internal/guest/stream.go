package guest

import (
	"bytes"
	"io"
	"strings"
	"sync"
)

// eventMark begins an event in the payload's output (ASCII record separator).
const eventMark = 0x1e

// maxEvent bounds the text of an event after its nonce.
const maxEvent = 64

// stream separates the bytes that come from a guest into the payload's output and events.
type stream struct {
	mark  []byte // eventMark, nonce, blank
	out   io.Writer
	event func(words []string)
	held  []byte // the end of what came, if it may be the beginning of an event
	err   error  // first error of out; from then on output is dropped, events are not
}

func newStream(nonce string, out io.Writer, event func(words []string)) *stream {
	mark := append([]byte{eventMark}, nonce...)
	return &stream{mark: append(mark, ' '), out: out, event: event}
}

func (s *stream) Write(p []byte) (int, error) {
	data := append(s.held, p...)
	s.held = nil
	for len(data) > 0 {
		i := bytes.IndexByte(data, eventMark)
		if i < 0 {
			s.emit(data)
			return len(p), nil
		}
		s.emit(data[:i])
		data = data[i:]
		switch {
		case len(data) < len(s.mark) && bytes.HasPrefix(s.mark, data):
			s.held = bytes.Clone(data)
			return len(p), nil
		case !bytes.HasPrefix(data, s.mark):
			s.emit(data[:1]) // the payload's own byte
			data = data[1:]
			continue
		}
		end := bytes.IndexByte(data, '\n')
		if end < 0 && len(data) < len(s.mark)+maxEvent {
			s.held = bytes.Clone(data)
			return len(p), nil
		}
		if end < 0 {
			s.emit(data[:1])
			data = data[1:]
			continue
		}
		s.event(strings.Fields(string(data[len(s.mark):end])))
		data = data[end+1:]
	}
	return len(p), nil
}

// flush emits, at the end of the stream, what was held back.
func (s *stream) flush() {
	s.emit(s.held)
	s.held = nil
}

func (s *stream) emit(p []byte) {
	if len(p) > 0 && s.err == nil {
		_, s.err = s.out.Write(p)
	}
}

// tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	mu  sync.Mutex // guards buf
	buf []byte
}

const tailBytes = 64 << 10

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if len(t.buf) > 2*tailBytes {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-tailBytes:]...)
	}
	return len(p), nil
}

func (t *tailBuffer) tail(n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return lastLines(string(t.buf), n)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\r\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
