package format

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"time"
)

// Volume is a row of the table of volumes: a named, writable disk. Size is a number of bytes, and LogicalBlock is 512
// or BlockSize. Branch is the branch to whose head the volume writes.
type Volume struct {
	ID           uint32    `json:"id"`
	Name         string    `json:"name"`
	Size         int64     `json:"size"`
	Codec        Codec     `json:"codec"`
	Level        int       `json:"level"`
	LogicalBlock int       `json:"logical_block"`
	Branch       uint32    `json:"branch"`
	Created      time.Time `json:"created"`
	// Properties are the user's own. Nobody changes the map of a row; a row with other properties has another map.
	Properties map[string]string `json:"properties,omitempty"`
	// Receiving is set for a volume whose content is being received. Nobody changes what it points to.
	Receiving *Receiving `json:"receiving,omitempty"`
}

// Receiving says what a volume is being filled with, and how far.
type Receiving struct {
	// Volume and Snapshot are the names of the target, and of the snapshot that the target gets.
	Volume   string `json:"volume"`
	Snapshot string `json:"snapshot"`
	// GUID is that of the snapshot, Base that of the state to which the stream is applied, or zero.
	GUID GUID `json:"guid"`
	Base GUID `json:"base,omitzero"`
	// Size is the size of the snapshot in bytes. The volume is as large as its base until all is received.
	Size int64 `json:"size"`
	// Created is the time of creation of the snapshot.
	Created time.Time `json:"created"`
	// Block is the mark: everything before it has been received. It is at most the number of blocks of the snapshot.
	Block uint64 `json:"block"`
}

// Snapshot is a row of the table of snapshots: a named point of a branch. Size is the size of the volume in bytes when
// the snapshot was taken. Volume is 0 if the snapshot is deleted and its row is still needed.
type Snapshot struct {
	ID      uint32    `json:"id"`
	Volume  uint32    `json:"volume"`
	Name    string    `json:"name"`
	Branch  uint32    `json:"branch"`
	Epoch   uint32    `json:"epoch"`
	Size    int64     `json:"size"`
	Created time.Time `json:"created"`
	// GUID identifies the state. It is zero in a row that a program before version 4 of the store wrote: see GUIDOf.
	GUID GUID `json:"guid,omitzero"`
	// Holds are the tags that keep the snapshot from being removed, each with the time since when. Nobody changes the
	// map of a row; a row with other holds has another map.
	Holds map[string]time.Time `json:"holds,omitempty"`
}

// Branch is a row of the table of branches: a line of history, and its current epoch. Origin is the point of another
// branch at which it began. Both origin fields are 0 if there is none.
type Branch struct {
	ID           uint32 `json:"id"`
	Epoch        uint32 `json:"epoch"`
	OriginBranch uint32 `json:"origin_branch"`
	OriginEpoch  uint32 `json:"origin_epoch"`
}

// Checkpoint is the replay position: the tables are durable up to this place in the log.
type Checkpoint struct {
	// Seq is the sequence number of the first record to replay.
	Seq uint64 `json:"seq"`
	// ChunkSeq and Offset say where that record is, or will be: in which chunk, and at which byte of it.
	ChunkSeq uint64 `json:"chunk_seq"`
	Offset   uint32 `json:"offset"`
	// NextID is the next id of a volume, a snapshot or a branch.
	NextID uint32 `json:"next_id"`
	// NextChunkSeq is the sequence number of the next chunk that is made.
	NextChunkSeq uint64 `json:"next_chunk_seq"`
}

// ColdMark is a place in the log: the cold pass has gone over everything before it.
type ColdMark struct {
	ChunkSeq uint64 `json:"chunk_seq"`
	Offset   uint32 `json:"offset"`
}

const maxVolumeSize = int64(MaxBlocks) * BlockSize

func (v Volume) check() error {
	switch {
	case v.ID == 0 || v.Branch == 0:
		return errors.New("no id or branch")
	case v.Size <= 0 || v.Size > maxVolumeSize:
		return fmt.Errorf("size %d", v.Size)
	case v.LogicalBlock != 512 && v.LogicalBlock != BlockSize:
		return fmt.Errorf("logical block %d", v.LogicalBlock)
	}
	if err := v.Receiving.check(); err != nil {
		return err
	}
	return errors.Join(CheckName(v.Name), CheckLevel(v.Codec, v.Level), CheckProperties(v.Properties))
}

func (r *Receiving) check() error {
	switch {
	case r == nil:
		return nil
	case r.GUID.IsZero() || r.GUID == r.Base:
		return fmt.Errorf("receiving %v on top of %v", r.GUID, r.Base)
	case r.Size <= 0 || r.Size > maxVolumeSize || r.Block > blocksOf(r.Size):
		return fmt.Errorf("receiving block %d of %d bytes", r.Block, r.Size)
	}
	return errors.Join(CheckName(r.Volume), CheckSnapshotName(r.Snapshot))
}

// blocksOf returns the number of blocks of a volume of n bytes.
func blocksOf(n int64) uint64 { return uint64(n+BlockSize-1) / BlockSize }

func (s Snapshot) check() error {
	switch {
	case s.ID == 0 || s.Branch == 0 || s.Epoch == 0:
		return errors.New("no id, branch or epoch")
	case s.Size <= 0 || s.Size > maxVolumeSize:
		return fmt.Errorf("size %d", s.Size)
	case s.Volume == 0:
		return CheckHolds(s.Holds)
	}
	return errors.Join(CheckSnapshotName(s.Name), CheckHolds(s.Holds))
}

func (b Branch) check() error {
	switch {
	case b.ID == 0 || b.Epoch == 0:
		return errors.New("no id or epoch")
	case b.OriginBranch == b.ID, (b.OriginBranch == 0) != (b.OriginEpoch == 0):
		return fmt.Errorf("origin %d epoch %d", b.OriginBranch, b.OriginEpoch)
	}
	return nil
}

func (c Checkpoint) check() error {
	if c.Seq == 0 || c.Offset%RecordAlign != 0 || c.Offset > MaxChunkSize {
		return fmt.Errorf("seq %d, offset %d", c.Seq, c.Offset)
	}
	return nil
}

func (c ColdMark) check() error {
	if c.Offset%RecordAlign != 0 || c.Offset > MaxChunkSize {
		return fmt.Errorf("offset %d", c.Offset)
	}
	return nil
}

// row is a row that is stored as JSON, or a pointer to one.
type row interface{ check() error }

var errNotRow = errors.New("not a row")

// AppendRow appends the encoding of a row to dst and returns the extended slice. v is a Volume, a Snapshot, a Branch, a
// Checkpoint or a ColdMark, or a pointer to one. AppendRow refuses a row that DecodeRow would reject, and then returns
// dst unchanged.
func AppendRow(dst []byte, v any) ([]byte, error) {
	r, ok := v.(row)
	if !ok {
		return dst, fmt.Errorf("encode %T: %w", v, errNotRow)
	}
	if err := r.check(); err != nil {
		return dst, fmt.Errorf("encode %T: %w", v, err)
	}
	text, err := json.Marshal(v)
	if err != nil {
		return dst, fmt.Errorf("encode %T: %w", v, err)
	}
	dst = le.AppendUint32(dst, Checksum(text))
	return append(dst, text...), nil
}

// DecodeRow decodes a row, which is all of src, into v, a pointer to a row of the type that was encoded. A field that
// this version does not know is an error, because a format with more fields has another version. The error matches
// ErrCorrupt, unless v is no pointer to a row.
func DecodeRow(src []byte, v any) error {
	p := reflect.ValueOf(v)
	r, ok := v.(row)
	if !ok || p.Kind() != reflect.Pointer || p.IsNil() {
		return fmt.Errorf("decode into %T: %w", v, errNotRow)
	}
	p.Elem().SetZero()
	if len(src) < 4 {
		return corruptRow(v, "%d bytes", len(src))
	}
	text := src[4:]
	if got, want := Checksum(text), le.Uint32(src); got != want {
		return corruptRow(v, "checksum %08x, want %08x", got, want)
	}
	if u, ok := v.(usual); !ok || !u.readUsual(text) {
		p.Elem().SetZero()
		if err := decodeJSON(text, v); err != nil {
			return corruptRow(v, "%v", err)
		}
	}
	if err := r.check(); err != nil {
		return corruptRow(v, "%v", err)
	}
	return nil
}

func corruptRow(v any, format string, args ...any) error {
	return corrupt(fmt.Sprintf("row %T", v), format, args...)
}

// decodeJSON decodes src into v. src must be one JSON value, and have no fields but those of v.
func decodeJSON(src []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(src))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("data after the end")
	}
	return nil
}

// Chunk is a row of the table of chunks: which chunk is in a slot, and how much of it is alive.
type Chunk struct {
	// Slot is the slot of the chunk, which is the row's key.
	Slot uint32
	// Seq is the chunk sequence number.
	Seq uint64
	// End is the offset at which the records end.
	End uint32
	// Live is the number of live bytes. It is at most End.
	Live uint32
}

// ChunkRowSize is the size in bytes of an encoded Chunk.
const ChunkRowSize = 20

// Encode returns the encoding of the row, without its slot.
func (c *Chunk) Encode() [ChunkRowSize]byte {
	var b [ChunkRowSize]byte
	le.PutUint64(b[4:], c.Seq)
	le.PutUint32(b[12:], c.End)
	le.PutUint32(b[16:], c.Live)
	le.PutUint32(b[:], Checksum(b[4:]))
	return b
}

// DecodeChunk decodes the row of the chunk in slot, which is all of src. The error matches ErrCorrupt.
func DecodeChunk(slot uint32, src []byte) (Chunk, error) {
	what := fmt.Sprintf("row of chunk slot %08x", slot)
	if len(src) != ChunkRowSize {
		return Chunk{}, corrupt(what, "%d bytes, want %d", len(src), ChunkRowSize)
	}
	if got, want := Checksum(src[4:]), le.Uint32(src); got != want {
		return Chunk{}, corrupt(what, "checksum %08x, want %08x", got, want)
	}
	c := Chunk{Slot: slot, Seq: le.Uint64(src[4:]), End: le.Uint32(src[12:]), Live: le.Uint32(src[16:])}
	if c.Slot >= MaxSlots || c.Seq == 0 || c.End > MaxChunkSize || c.End%RecordAlign != 0 || c.Live > c.End {
		return Chunk{}, corrupt(what, "%+v", c)
	}
	return c, nil
}
