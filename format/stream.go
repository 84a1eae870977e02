package format

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A stream carries one snapshot from one store to another: see docs/streams.md, The stream. Package internal/stream
// reads and writes whole streams.
const (
	// StreamVersion is the version of streams. A program refuses a stream of a higher version.
	StreamVersion = 1
	// FrameHeaderSize is the size in bytes of what precedes the payload of a frame.
	FrameHeaderSize = 24
	// MaxFramePayload is the largest payload of a frame in bytes.
	MaxFramePayload = 4 << 20
	// StreamItemSize is the size in bytes of an item of a units frame, without its unit.
	StreamItemSize = 16
	// StreamMarkSize is the size in bytes of the payload of a mark or end frame.
	StreamMarkSize = 56
	// MarkBytes is the largest number of bytes of payload between two marks of a stream.
	MarkBytes = 64 << 20

	frameMagic = "VDSF"
	frameCRC   = 20 // offset of the CRC, and the number of bytes of the header that it covers
)

// FrameKind is the kind of a frame.
type FrameKind uint8

// The kinds of frames.
const (
	FrameHeader FrameKind = 1 // what the stream carries
	FrameUnits  FrameKind = 2 // units and holes
	FrameMark   FrameKind = 3 // a place at which a cut stream can be resumed
	FrameEnd    FrameKind = 4 // the end of the stream
)

// String returns the kind's name: header, units, mark or end.
func (k FrameKind) String() string {
	switch k {
	case FrameHeader:
		return "header"
	case FrameUnits:
		return "units"
	case FrameMark:
		return "mark"
	case FrameEnd:
		return "end"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// Frame is the header of a frame.
type Frame struct {
	Kind FrameKind
	// Number is the number of the frame in its stream, from 0.
	Number uint64
	// Length is the length of the payload in bytes.
	Length int
}

// AppendFrame appends a frame with that payload to dst and returns the extended slice.
func AppendFrame(dst []byte, kind FrameKind, number uint64, payload []byte) []byte {
	at := len(dst)
	dst = append(dst, frameMagic...)
	dst = append(dst, byte(kind), 0, 0, 0)
	dst = le.AppendUint64(dst, number)
	dst = le.AppendUint32(dst, uint32(len(payload)))
	dst = le.AppendUint32(dst, frameChecksum(dst[at:], payload))
	return append(dst, payload...)
}

func frameChecksum(head, payload []byte) uint32 {
	return MoreChecksum(Checksum(head[:frameCRC]), payload)
}

// DecodeFrame decodes the header of a frame, the first FrameHeaderSize bytes of src. It bounds the length, so that a
// caller can make room for the payload, and proves nothing else: VerifyFrame does. The error matches ErrCorrupt.
func DecodeFrame(src []byte) (Frame, error) {
	if len(src) < FrameHeaderSize {
		return Frame{}, corrupt("frame", "%d bytes of header", len(src))
	}
	f := Frame{Kind: FrameKind(src[4]), Number: le.Uint64(src[8:]), Length: int(le.Uint32(src[16:]))}
	most, least := MaxFramePayload, StreamItemSize
	switch f.Kind {
	case FrameHeader:
		most, least = MaxPayload, 2
	case FrameMark, FrameEnd:
		most, least = StreamMarkSize, StreamMarkSize
	}
	switch {
	case string(src[:4]) != frameMagic:
		return Frame{}, corrupt("frame", "it begins with %q, not with %q", src[:4], frameMagic)
	case f.Kind < FrameHeader || f.Kind > FrameEnd:
		return Frame{}, corrupt("frame", "%v", f.Kind)
	case src[5]|src[6]|src[7] != 0:
		return Frame{}, corrupt("frame", "reserved bytes %x", src[5:8])
	case f.Length < least || f.Length > most:
		return Frame{}, corrupt("frame", "%d bytes of payload in a frame of kind %v", f.Length, f.Kind)
	}
	return f, nil
}

// VerifyFrame returns nil if the checksum in a frame's header, which is at the front of head, is that of the frame.
// Otherwise it returns an error that matches ErrCorrupt.
func VerifyFrame(head, payload []byte) error {
	if got, want := frameChecksum(head, payload), le.Uint32(head[frameCRC:]); got != want {
		return corrupt("frame", "checksum %08x, want %08x", got, want)
	}
	return nil
}

// StreamHeader is the payload of a stream's first frame.
type StreamHeader struct {
	Version int `json:"version"`
	// Features name what a receiver must know to read the stream.
	Features []string `json:"features"`
	// Volume and Snapshot say where the stream comes from.
	Volume   string `json:"volume"`
	Snapshot string `json:"snapshot"`
	// GUID is that of the snapshot. Base is that of the state to which the stream has to be applied; it is zero in a
	// full stream.
	GUID GUID `json:"guid"`
	Base GUID `json:"base,omitzero"`
	// BaseName is the name of the base, VOL@SNAP, for messages.
	BaseName string `json:"base_name,omitempty"`
	// Size, LogicalBlock, Codec and Level are those of a volume; Created is the time of creation of the snapshot.
	Size         int64             `json:"size"`
	LogicalBlock int               `json:"logical_block"`
	Codec        Codec             `json:"codec"`
	Level        int               `json:"level"`
	Created      time.Time         `json:"created"`
	Properties   map[string]string `json:"properties,omitempty"`
	// From is the block at which the stream begins.
	From uint64 `json:"from,omitempty"`
}

const (
	// FeatureZstd is the feature of a stream that may have units of the codec zstd.
	FeatureZstd = "zstd"
	// FeatureNames is the feature of a stream whose header names a snapshot as programs before version 5 of the store
	// do not know it. AppendStreamHeader adds it.
	FeatureNames = "names"
)

var streamFeatures = []string{FeatureZstd, FeatureNames}

// Blocks returns the number of blocks of the snapshot.
func (h *StreamHeader) Blocks() uint64 { return blocksOf(h.Size) }

// newNames reports whether the stream needs FeatureNames.
func (h *StreamHeader) newNames() bool {
	return strings.ContainsAny(h.Snapshot+h.BaseName, moreInSnapshots)
}

func (h *StreamHeader) check() error {
	switch {
	case h.GUID.IsZero() || h.GUID == h.Base:
		return fmt.Errorf("guid %q, base %q", h.GUID, h.Base)
	case h.Base.IsZero() != (h.BaseName == ""):
		return fmt.Errorf("base %q with the name %q", h.Base, h.BaseName)
	case h.Size <= 0 || h.Size > maxVolumeSize:
		return fmt.Errorf("size %d", h.Size)
	case h.LogicalBlock != 512 && h.LogicalBlock != BlockSize || h.Size%int64(h.LogicalBlock) != 0:
		return fmt.Errorf("logical block %d, size %d", h.LogicalBlock, h.Size)
	case h.From > h.Blocks():
		return fmt.Errorf("it begins at block %d of %d", h.From, h.Blocks())
	}
	if h.BaseName != "" {
		v, sn, _ := strings.Cut(h.BaseName, "@")
		if err := errors.Join(CheckName(v), CheckSnapshotName(sn)); err != nil {
			return err
		}
	}
	if h.newNames() && !slices.Contains(h.Features, FeatureNames) {
		return fmt.Errorf("the names %q and %q without the feature %q", h.Snapshot, h.BaseName, FeatureNames)
	}
	return errors.Join(CheckName(h.Volume), CheckSnapshotName(h.Snapshot), CheckLevel(h.Codec, h.Level), CheckProperties(h.Properties))
}

// AppendStreamHeader appends the payload of the frame to dst and returns the extended slice. It sets the version, adds
// FeatureNames if the stream needs it, and refuses a header that DecodeStreamHeader would reject.
func AppendStreamHeader(dst []byte, h *StreamHeader) ([]byte, error) {
	h.Version = StreamVersion
	if h.newNames() && !slices.Contains(h.Features, FeatureNames) {
		h.Features = append(slices.Clip(h.Features), FeatureNames)
	}
	if err := h.check(); err != nil {
		return dst, fmt.Errorf("encode stream header: %w", err)
	}
	text, err := json.Marshal(h)
	if err != nil {
		return dst, fmt.Errorf("encode stream header: %w", err)
	}
	return append(dst, text...), nil
}

// DecodeStreamHeader decodes the payload of a header frame, which is all of src. The error matches ErrVersion if the
// stream needs a later program, and otherwise ErrCorrupt.
func DecodeStreamHeader(src []byte) (h StreamHeader, err error) {
	var head struct { // a later version may have other fields, so look at these first
		Version  int      `json:"version"`
		Features []string `json:"features"`
	}
	if err := json.Unmarshal(src, &head); err != nil {
		return h, corrupt("stream header", "%v", err)
	}
	if err := checkVersion("stream", head.Version, StreamVersion); err != nil {
		return h, err
	}
	for _, f := range head.Features {
		if !slices.Contains(streamFeatures, f) {
			return h, fmt.Errorf("stream: %w: it needs %q, which this program does not know", ErrVersion, f)
		}
	}
	if err := decodeJSON(src, &h); err != nil {
		return h, corrupt("stream header", "%v", err)
	}
	if err := h.check(); err != nil {
		return h, corrupt("stream header", "%v", err)
	}
	return h, nil
}

// StreamItem is a unit, or a run of blocks that are holes.
type StreamItem struct {
	// First is the first block, and Blocks the number of blocks, which lie in one leaf.
	First  uint64
	Blocks int
	// Codec and Unit are those of a record. Unit is nil in a hole.
	Codec Codec
	Unit  []byte
}

const (
	itemUnit = 1
	itemHole = 2
)

// IsHole reports whether the blocks become holes.
func (it *StreamItem) IsHole() bool { return len(it.Unit) == 0 }

// End returns the block behind the item.
func (it *StreamItem) End() uint64 { return it.First + uint64(it.Blocks) }

// AppendStreamItem appends an item to the payload of a units frame and returns the extended slice.
func AppendStreamItem(dst []byte, it *StreamItem) []byte {
	kind := byte(itemUnit)
	if it.IsHole() {
		kind = itemHole
	}
	dst = le.AppendUint64(dst, it.First)
	dst = le.AppendUint16(dst, uint16(it.Blocks))
	dst = append(dst, kind, byte(it.Codec))
	dst = le.AppendUint32(dst, uint32(len(it.Unit)))
	return append(dst, it.Unit...)
}

// NextStreamItem decodes the item at the front of src, the rest of the payload of a units frame. It returns what
// follows it. The unit is a part of src. What the unit says is not looked at. The error matches ErrCorrupt.
func NextStreamItem(src []byte) (it StreamItem, rest []byte, err error) {
	if len(src) < StreamItemSize {
		return it, nil, corrupt("item", "%d bytes", len(src))
	}
	kind, length := src[10], uint64(le.Uint32(src[12:]))
	it = StreamItem{First: le.Uint64(src), Blocks: int(le.Uint16(src[8:])), Codec: Codec(src[11])}
	src = src[StreamItemSize:]
	span := uint64(UnitBlocks)
	if kind == itemHole {
		span = LeafBlocks
	}
	full := uint64(it.Blocks) * BlockSize
	switch {
	case kind != itemUnit && kind != itemHole:
		return it, nil, corrupt("item", "kind %d", kind)
	case it.First >= MaxBlocks || it.Blocks == 0 || it.First%span+uint64(it.Blocks) > span:
		return it, nil, corrupt("item", "%d blocks at block %d", it.Blocks, it.First)
	case length > uint64(len(src)):
		return it, nil, corrupt("item", "a unit of %d bytes at block %d, and the frame has %d more", length, it.First, len(src))
	case kind == itemHole && (length != 0 || it.Codec != Raw):
		return it, nil, corrupt("item", "a hole of %d bytes, codec %v", length, it.Codec)
	case kind == itemUnit && (it.Codec > Zstd || length == 0 || length > full || it.Codec == Raw && length != full):
		return it, nil, corrupt("item", "%d blocks in %d bytes, codec %v", it.Blocks, length, it.Codec)
	}
	if kind == itemUnit {
		it.Unit = src[:length:length]
	}
	return it, src[length:], nil
}

// StreamMark is the payload of a mark or end frame.
type StreamMark struct {
	// Block is the block at which the next frame begins, or a later one. In an end frame it is the number of blocks of
	// the snapshot.
	Block uint64
	// Units and Bytes are the numbers of items, and of bytes in payloads of units frames, so far.
	Units, Bytes uint64
	// Sum is the SHA-256 of the stream before the frame.
	Sum [sha256.Size]byte
}

// AppendStreamMark appends the payload of a mark or end frame to dst and returns the extended slice.
func AppendStreamMark(dst []byte, m *StreamMark) []byte {
	dst = le.AppendUint64(dst, m.Block)
	dst = le.AppendUint64(dst, m.Units)
	dst = le.AppendUint64(dst, m.Bytes)
	return append(dst, m.Sum[:]...)
}

// DecodeStreamMark decodes the payload of a mark or end frame, which is all of src. The error matches ErrCorrupt.
func DecodeStreamMark(src []byte) (m StreamMark, err error) {
	if len(src) != StreamMarkSize {
		return m, corrupt("mark", "%d bytes", len(src))
	}
	m = StreamMark{Block: le.Uint64(src), Units: le.Uint64(src[8:]), Bytes: le.Uint64(src[16:])}
	copy(m.Sum[:], src[24:])
	return m, nil
}
