package format

import (
	"encoding/json"
	"errors"
	"fmt"
)

// Event is the payload of an event record. It lists the rows that one operation changed, as they are afterwards, and
// the ids of the volumes that it deleted.
type Event struct {
	// Op names the operation, for people.
	Op          string     `json:"op"`
	Volumes     []Volume   `json:"volumes,omitempty"`
	Snapshots   []Snapshot `json:"snapshots,omitempty"`
	Branches    []Branch   `json:"branches,omitempty"`
	DropVolumes []uint32   `json:"drop_volumes,omitempty"`
}

// ErrTooLarge is matched by the error of AppendEvent for an event that is longer than MaxPayload.
var ErrTooLarge = errors.New("too large")

func (e *Event) check() error {
	var errs []error
	for i := range e.Volumes {
		errs = append(errs, e.Volumes[i].check())
	}
	for i := range e.Snapshots {
		errs = append(errs, e.Snapshots[i].check())
	}
	for i := range e.Branches {
		errs = append(errs, e.Branches[i].check())
	}
	return errors.Join(errs...)
}

// AppendEvent appends the payload of the event to dst and returns the extended slice. It refuses an event that
// DecodeEvent would reject. The error for an event of more than MaxPayload bytes matches ErrTooLarge. After an error it
// returns dst unchanged.
func AppendEvent(dst []byte, e *Event) ([]byte, error) {
	if err := e.check(); err != nil {
		return dst, fmt.Errorf("encode event %s: %w", e.Op, err)
	}
	text, err := json.Marshal(e)
	if err != nil {
		return dst, fmt.Errorf("encode event %s: %w", e.Op, err)
	}
	if len(text) > MaxPayload {
		return dst, fmt.Errorf("encode event %s: %w: %d bytes, the most is %d", e.Op, ErrTooLarge, len(text), MaxPayload)
	}
	return append(dst, text...), nil
}

// DecodeEvent decodes the payload of an event record, which is all of src, into e. The caller has verified the payload
// (RecordHeader.VerifyPayload). The error matches ErrCorrupt.
func DecodeEvent(src []byte, e *Event) error {
	if len(src) > MaxPayload {
		return corrupt("event", "%d bytes", len(src))
	}
	*e = Event{}
	if err := decodeJSON(src, e); err != nil {
		return corrupt("event", "%v", err)
	}
	if err := e.check(); err != nil {
		return corrupt("event "+e.Op, "%v", err)
	}
	return nil
}
