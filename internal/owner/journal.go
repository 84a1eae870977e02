package owner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"unicode"

	"github.com/vdisk/vdisk/cow"
	"github.com/vdisk/vdisk/internal/journal"
	"github.com/vdisk/vdisk/internal/storage"
)

// Journal opens the journal of the store at dir. It needs no owner, and nothing waits for anything. The caller closes it.
func Journal(dir string, foreign bool) (*journal.Tail, error) {
	in, err := storage.OpenFolder(dir, foreign)
	if err == nil {
		if _, err = in.Lstat("format"); err == nil {
			return journal.NewTail(in), nil
		}
		_ = in.Close() // nothing was written
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("no store at %s: %w", dir, errors.Join(cow.ErrNotFound, err))
	}
	return nil, err
}

// did notes in the journal what was done for the caller that ctx has, and returns err, which is how it ended. What was
// refused is no deed, and is not noted.
func (o *Owner) did(ctx context.Context, e journal.Entry, err error) error {
	if err != nil && refused(err) {
		return err
	}
	o.note(ctx, e, err)
	return err
}

// note is did for what is noted however it ended.
func (o *Owner) note(ctx context.Context, e journal.Entry, err error) {
	e.By = callerOf(ctx)
	if e.By == nil {
		e.By = journal.Here(o.opts.Command)
	}
	if err != nil {
		e.Error = err.Error()
	}
	o.happened(e)
}

// happened notes what nobody has asked for.
func (o *Owner) happened(e journal.Entry) {
	o.opts.Logger.Debug(e.Kind, attributesOf(e)...)
	o.journal.Add(e)
}

// begun notes that something begins that takes long. The returned function notes how it ended; details may be nil.
func (o *Owner) begun(ctx context.Context, e journal.Entry) (ended func(details map[string]any, err error)) {
	e.Phase = journal.Start
	o.note(ctx, e, nil)
	return func(details map[string]any, err error) {
		e.Phase, e.Details = journal.End, details
		o.note(ctx, e, err)
	}
}

// noteStart notes that an owner that lasts has begun, and what it has found.
func (o *Owner) noteStart() {
	if r := o.store.Recovery(); o.opts.lasts() || r.DroppedBytes > 0 {
		details := map[string]any{"version": o.opts.Version}
		if r.Records > 0 { // the last owner was killed, or the machine was
			details["replayed_records"], details["replayed_bytes"] = r.Records, r.Bytes
		}
		if r.DroppedBytes > 0 {
			details["dropped_bytes"] = r.DroppedBytes
		}
		o.happened(journal.Entry{Kind: "start", By: journal.Here(o.opts.Command), Details: details})
	}
}

// noteFill notes that the store was filled to a level, or is less full again.
func (o *Owner) noteFill(c cow.FillChange) {
	o.happened(journal.Entry{Kind: "fill", Details: map[string]any{
		"level": c.Level, "above": c.Above, "percent": c.Percent(), "bytes": c.Bytes, "full_at": c.FullAt,
	}})
}

// noteStop notes that an owner that lasts has ended.
func (o *Owner) noteStop(err error) {
	if o.opts.lasts() {
		o.note(context.Background(), journal.Entry{Kind: "stop"}, err)
	}
}

// notices are what happens to the store. They wait until there is an owner that can note them.
type notices struct {
	mu    sync.Mutex // guards the fields below
	owner *Owner
	early []cow.Notice
}

func (n *notices) take(x cow.Notice) {
	n.mu.Lock()
	o := n.owner
	if o == nil {
		n.early = append(n.early, x)
	}
	n.mu.Unlock()
	if o != nil {
		o.noteNotice(x)
	}
}

func (n *notices) giveTo(o *Owner) {
	n.mu.Lock()
	early := n.early
	n.owner, n.early = o, nil
	n.mu.Unlock()
	for _, x := range early {
		o.noteNotice(x)
	}
}

func (o *Owner) noteNotice(x cow.Notice) {
	e := journal.Entry{Kind: string(x.Kind), Error: x.Err.Error()}
	if x.Where != "" {
		e.Details = map[string]any{"where": x.Where}
	}
	for _, l := range x.Lost {
		if name := l.Ref.String(); !slices.Contains(e.Names, name) {
			e.Names = append(e.Names, name)
		}
	}
	o.happened(e)
}

// refused reports whether an operation was refused before it did anything.
func refused(err error) bool {
	for _, why := range []error{cow.ErrNotFound, cow.ErrExists, cow.ErrInvalid, cow.ErrBusy, cow.ErrReadOnly, ErrUnsupported} {
		if errors.Is(err, why) {
			return true
		}
	}
	return false
}

// attributesOf returns an entry for a log.
func attributesOf(e journal.Entry) (list []any) {
	if len(e.Names) > 0 {
		list = append(list, "names", strings.Join(e.Names, " "))
	}
	for _, kv := range [][2]string{{"from", e.From}, {"phase", e.Phase}, {"err", e.Error}} {
		if kv[1] != "" {
			list = append(list, kv[0], kv[1])
		}
	}
	for k, v := range e.Details {
		list = append(list, k, v)
	}
	if e.By != nil {
		list = append(list, "uid", e.By.UID, "pid", e.By.PID, "command", e.By.Command)
	}
	return list
}

func namesOf(refs []cow.Ref) (names []string) {
	for _, r := range refs {
		names = append(names, r.String())
	}
	return names
}

// callerKey is the key of the caller in the context of a client's operation.
type callerKey struct{}

func callerOf(ctx context.Context) *journal.Caller {
	by, _ := ctx.Value(callerKey{}).(*journal.Caller)
	return by
}

// commandHeader is how a client says which command it is. An owner believes it, since it is only for people.
const commandHeader = "Vdisk-Command"

// withPeer returns a context that has the process at the other end of a connection as its caller.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	cred, err := credentials(u)
	if err != nil {
		return ctx
	}
	return context.WithValue(ctx, callerKey{}, &journal.Caller{UID: cred.Uid, PID: int(cred.Pid)})
}

// named gives the caller in a request's context the name of its command.
func named(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		command := r.Header.Get(commandHeader)
		if by := callerOf(r.Context()); by != nil && command != "" && len(command) <= 64 && !strings.ContainsFunc(command, unicode.IsControl) {
			r = r.WithContext(context.WithValue(r.Context(), callerKey{}, &journal.Caller{UID: by.UID, PID: by.PID, Command: command}))
		}
		h.ServeHTTP(w, r)
	})
}
