package owner

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
)

// Send writes a snapshot to w as a stream.
func (o *Owner) Send(ctx context.Context, so cow.SendOptions, w io.Writer) ([]cow.Sent, error) {
	if so.Estimate {
		return o.store.Send(ctx, so, w)
	}
	e := journal.Entry{Kind: "send", Names: []string{so.Snapshot.String()}}
	if so.Base != (cow.Ref{}) {
		e.From = so.Base.String()
	}
	ended := o.begun(ctx, e)
	list, err := o.store.Send(ctx, so, w)
	var length int64
	for _, s := range list {
		length += s.Length
	}
	ended(map[string]any{"streams": len(list), "stream_bytes": length}, err)
	return list, err
}

// Receive makes snapshots of the streams in r. A read of r must end with ctx.
func (o *Owner) Receive(ctx context.Context, r io.Reader, ro cow.ReceiveOptions) ([]cow.Received, error) {
	if o.unread != nil {
		return nil, o.unread
	}
	if err := o.notWaiting(cow.Ref{Volume: ro.Target.Volume}); err != nil {
		return nil, err
	}
	if ro.DryRun {
		return o.receive(ctx, r, ro)
	}
	ended := o.begun(ctx, journal.Entry{Kind: "receive", Names: []string{ro.Target.String()}})
	list, err := o.receive(ctx, r, ro)
	var length int64
	names := make([]string, len(list))
	for i, s := range list {
		names[i] = s.Snapshot.String()
		length += s.Length
	}
	ended(map[string]any{"received": names, "stream_bytes": length}, err)
	return list, err
}

func (o *Owner) receive(ctx context.Context, r io.Reader, ro cow.ReceiveOptions) ([]cow.Received, error) {
	list, err := o.store.Receive(ctx, r, ro)
	return list, o.inUse(ro.Target.Volume, err)
}

// AbortReceive gives up what has been received of a volume.
func (o *Owner) AbortReceive(ctx context.Context, name string) error {
	e := journal.Entry{Kind: "receive", Names: []string{name}, Details: map[string]any{"abort": true}}
	return o.did(ctx, e, o.store.Abort(name))
}

// The answer to send is a sequence of pieces: a kind, a length and that many bytes. A stream of bytes alone could not say
// why it ends.
const (
	pieceData     = 'd' // a part of the stream
	pieceProgress = 'p' // JSON: two numbers
	pieceEnd      = 'e' // JSON: a sendEnd. The last piece
	pieceHead     = 5
	mostPiece     = 8 << 20 // a frame of a stream, and some more
)

type sendEnd struct {
	Sent  []cow.Sent `json:",omitempty"`
	Error *Error     `json:",omitempty"`
}

// pieces writes pieces. It may be used concurrently.
type pieces struct {
	mu   sync.Mutex // guards all
	w    io.Writer
	head [pieceHead]byte
	last time.Time // of the last progress
}

func (p *pieces) put(kind byte, b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.head[0] = kind
	binary.LittleEndian.PutUint32(p.head[1:], uint32(len(b)))
	if _, err := p.w.Write(p.head[:]); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// Write writes a part of the stream.
func (p *pieces) Write(b []byte) (int, error) { return p.put(pieceData, b) }

// progress tells the client how far the stream is, a few times a second.
func (p *pieces) progress(done, size int64) {
	if time.Since(p.last) < 200*time.Millisecond {
		return
	}
	p.last = time.Now()
	if b, err := json.Marshal([2]int64{done, size}); err == nil {
		_, _ = p.put(pieceProgress, b) // if the client is gone, the next part of the stream says so
	}
}

// end writes the last piece.
func (p *pieces) end(sent []cow.Sent, err error) {
	end := sendEnd{Sent: sent}
	if err != nil {
		end.Error = toWire(err)
	}
	if b, err := json.Marshal(end); err == nil {
		_, _ = p.put(pieceEnd, b) // fails if the client is gone
	}
}

// readPieces reads pieces up to the last one, which it returns.
func readPieces(r io.Reader, w io.Writer, progress func(done, size int64)) (end sendEnd, err error) {
	var head [pieceHead]byte
	var b []byte
	for {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return end, err
		}
		n := int(binary.LittleEndian.Uint32(head[1:]))
		if n > mostPiece {
			return end, fmt.Errorf("the owner of the store sends a piece of %d bytes; is it another version of vdisk?", n)
		}
		if cap(b) < n {
			b = make([]byte, n)
		}
		b = b[:n]
		if _, err := io.ReadFull(r, b); err != nil {
			return end, err
		}
		switch head[0] {
		case pieceData:
			_, err = w.Write(b)
		case pieceProgress:
			var at [2]int64
			if err = json.Unmarshal(b, &at); err == nil && progress != nil {
				progress(at[0], at[1])
			}
		case pieceEnd:
			return end, json.Unmarshal(b, &end)
		default:
			err = fmt.Errorf("the owner of the store sends a piece of the kind %q; is it another version of vdisk?", head[0])
		}
		if err != nil {
			return end, err
		}
	}
}

func (c *control) sendSnapshot(w http.ResponseWriter, r *http.Request) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	waitLonger(w, exportStandstill)
	p := &pieces{w: w}
	req.Send.Progress = p.progress
	p.end(c.owner.Send(r.Context(), req.Send, p))
}

// Send writes a snapshot to w as a stream.
func (c *Client) Send(ctx context.Context, so cow.SendOptions, w io.Writer) ([]cow.Sent, error) {
	progress := so.Progress
	so.Progress = nil
	return c.pieces(ctx, "send", &request{Send: so}, w, progress)
}

// pieces sends a request whose answer is a sequence of pieces, and writes the stream in it to w.
func (c *Client) pieces(ctx context.Context, method string, req *request, w io.Writer, progress func(done, size int64)) ([]cow.Sent, error) {
	resp, err := c.post(ctx, method, req, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	end, err := readPieces(&answerBody{resp.Body, c, ctx}, w, progress)
	switch {
	case err != nil && ctx.Err() != nil:
		return end.Sent, context.Cause(ctx)
	case err != nil:
		return end.Sent, err
	case end.Error != nil:
		return end.Sent, end.Error
	}
	return end.Sent, nil
}

// receiveEnd is the answer to receive.
type receiveEnd struct {
	Received []cow.Received `json:",omitempty"`
	Error    *Error         `json:",omitempty"`
}

func (c *control) receiveSnapshot(w http.ResponseWriter, r *http.Request) {
	req, err := arguments(r)
	if err != nil {
		reply(w, nil, err)
		return
	}
	rc := http.NewResponseController(w)
	duplexErr := rc.EnableFullDuplex() // lets an error be answered while the client is still sending
	// The owner may be told to end while the client waits for a sender.
	stop := context.AfterFunc(r.Context(), func() { _ = rc.SetReadDeadline(time.Now()) })
	defer stop()
	var end receiveEnd
	if end.Received, err = c.owner.Receive(r.Context(), stoppedBody{r.Context(), r.Body}, req.Receive); err != nil {
		end.Error = toWire(err)
	}
	reply(w, end, nil)
	if err != nil && duplexErr == nil {
		// As for import: the client stops once it has read the answer.
		if errors.Join(rc.Flush(), rc.SetReadDeadline(time.Now().Add(stopTimeout))) == nil {
			_, _ = io.Copy(io.Discard, r.Body)
		}
	}
}

// stoppedBody is the body of a request. Once ctx has ended, an error of reading it says so.
type stoppedBody struct {
	ctx context.Context
	io.Reader
}

func (b stoppedBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && err != io.EOF && b.ctx.Err() != nil {
		err = errStopping
	}
	return n, err
}

// Receive makes snapshots of the streams in r. If ctx ends, the owner gets what was read, and notes how far that goes.
func (c *Client) Receive(ctx context.Context, r io.Reader, ro cow.ReceiveOptions) ([]cow.Received, error) {
	patient, cancel := outlast(ctx)
	defer cancel()
	body := &endingBody{r: r}
	ro.Progress = nil
	resp, err := c.post(patient, "receive", &request{Receive: ro}, io.NopCloser(body))
	if err != nil {
		return nil, errors.Join(body.err(), err)
	}
	defer resp.Body.Close()
	var end receiveEnd
	if err := json.NewDecoder(&answerBody{resp.Body, c, ctx}).Decode(&end); err != nil {
		return nil, errors.Join(body.err(), err)
	}
	if end.Error != nil {
		if err := body.err(); err != nil {
			return end.Received, fmt.Errorf("%w: %w", err, end.Error)
		}
		return end.Received, end.Error
	}
	return end.Received, nil
}

// endingBody is the body of a request. It ends where r fails: then the owner answers how far it came.
type endingBody struct {
	r      io.Reader
	mu     sync.Mutex // guards failed
	failed error
}

func (b *endingBody) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF {
		b.mu.Lock()
		b.failed, err = err, io.EOF
		b.mu.Unlock()
	}
	return n, err
}

// err returns why r failed, or nil.
func (b *endingBody) err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failed
}

// AbortReceive gives up what has been received of a volume.
func (c *Client) AbortReceive(ctx context.Context, name string) error {
	return c.call(ctx, "abort-receive", request{Name: name}, nil)
}
