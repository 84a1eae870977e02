package format

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Codec is a way to compress a unit.
type Codec uint8

// The codecs, by their number in a record header.
const (
	Raw  Codec = 0
	S2   Codec = 1
	Zstd Codec = 2
)

const (
	// MaxCompressed is the capacity in bytes of a buffer that is large enough for Compress with any unit and codec.
	MaxCompressed = UnitSize + UnitSize/6 + 64

	defaultZstdLevel = 3 // zstd(1)'s
	maxZstdLevel     = 19
)

// ErrCodec is matched by the error for an unknown codec, or for a level that the codec does not have.
var ErrCodec = errors.New("invalid compression")

// String returns the codec's name: none, s2 or zstd.
func (c Codec) String() string {
	switch c {
	case Raw:
		return "none"
	case S2:
		return "s2"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("codec %d", uint8(c))
}

// ParseCodec returns the codec with the given name, which is none, s2 or zstd. For any other name it returns an error
// that matches ErrCodec.
func ParseCodec(name string) (Codec, error) {
	for _, c := range []Codec{Raw, S2, Zstd} {
		if c.String() == name {
			return c, nil
		}
	}
	return 0, fmt.Errorf("%w: %q is not none, s2 or zstd", ErrCodec, name)
}

// MarshalText returns the codec's name. For an unknown codec it returns an error that matches ErrCodec.
func (c Codec) MarshalText() ([]byte, error) {
	if c > Zstd {
		return nil, fmt.Errorf("%w: %v", ErrCodec, c)
	}
	return []byte(c.String()), nil
}

// UnmarshalText sets the codec to the one that ParseCodec returns for text.
func (c *Codec) UnmarshalText(text []byte) (err error) {
	*c, err = ParseCodec(string(text))
	return err
}

// CheckLevel returns nil if the codec has the level, and otherwise an error that matches ErrCodec. zstd has levels 1 to
// 19, and the other codecs have none. Level 0 is the default of every codec.
func CheckLevel(c Codec, level int) error {
	switch {
	case c > Zstd:
		return fmt.Errorf("%w: %v", ErrCodec, c)
	case level == 0, c == Zstd && level > 0 && level <= maxZstdLevel:
		return nil
	case c == Zstd:
		return fmt.Errorf("%w: zstd has levels 1 to %d, not %d", ErrCodec, maxZstdLevel, level)
	}
	return fmt.Errorf("%w: %v has no levels", ErrCodec, c)
}

// Compressor compresses units. One goroutine at a time may use it, for any number of units.
type Compressor struct {
	codec Codec
	zstd  *zstd.Encoder
}

// NewCompressor returns a compressor for the codec and the level. It returns the error of CheckLevel.
func NewCompressor(c Codec, level int) (*Compressor, error) {
	if err := CheckLevel(c, level); err != nil {
		return nil, err
	}
	if c != Zstd {
		return &Compressor{codec: c}, nil
	}
	if level == 0 {
		level = defaultZstdLevel
	}
	enc, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)),
		zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(UnitSize),
		zstd.WithSingleSegment(true),
		zstd.WithEncoderCRC(false)) // the record has a checksum
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCodec, err)
	}
	return &Compressor{codec: c, zstd: enc}, nil
}

// Compress compresses src, a unit of whole blocks, and returns the bytes to store and the codec to store them with. If
// compression makes the padded record no smaller, it returns src itself and Raw. Otherwise out lies in dst, if dst has
// the capacity; MaxCompressed is always enough. dst and src must not overlap.
//
// Compress leaves out the zeros at the end of the unit. Blocks are often not full, and S2 takes ten times as long as
// copying to decode a run that ends where the unit does.
func (c *Compressor) Compress(dst, src []byte) (out []byte, codec Codec) {
	if c.codec == Raw {
		return src, Raw
	}
	full := src[:max(1, contentLen(src))]
	if c.codec == S2 {
		out = s2.Encode(dst[:0], full)
	} else {
		out = c.zstd.EncodeAll(full, dst[:0])
	}
	blocks := len(src) / BlockSize
	if len(out) == 0 || recordSize(len(out), blocks) >= recordSize(len(src), blocks) {
		return src, Raw
	}
	return out, c.codec
}

// contentLen returns the length of p without the zeros at its end.
func contentLen(p []byte) int {
	n := len(p)
	for _, step := range [...]int{1024, 64} {
		for n >= step && IsZero(p[n-step:n]) {
			n -= step
		}
	}
	for n > 0 && p[n-1] == 0 {
		n--
	}
	return n
}

// zstdDecoder returns a decoder that is made at its first use. Any number of goroutines may use it, and as many as
// there are processors decode at once. It never writes beyond the capacity of the destination.
var zstdDecoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(0),
		zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(UnitSize),
		zstd.WithDecodeAllCapLimit(true))
})

// Decompress decompresses src into dst, whose length is that of the unit. Zeros that were left out at the end of the
// unit are filled in. An error about src matches ErrCorrupt. Decompress may be called concurrently.
func Decompress(c Codec, dst, src []byte) error {
	dst = dst[:len(dst):len(dst)]
	n := 0
	switch c {
	case Raw:
		if len(src) != len(dst) {
			return corruptUnit(c, len(src), len(dst))
		}
		n = copy(dst, src)
	case S2:
		// s2.Decode allocates whatever length src claims, so check the length first.
		var err error
		if n, err = s2.DecodedLen(src); err != nil {
			return corrupt("s2 unit", "%v", err)
		}
		if n > len(dst) {
			return corruptUnit(c, n, len(dst))
		}
		if _, err := s2.Decode(dst, src); err != nil {
			return corrupt("s2 unit", "%v", err)
		}
	case Zstd:
		var err error
		if n, err = decompressZstd(dst, src); err != nil {
			return err
		}
	default:
		return corrupt("unit", "%v", c)
	}
	clear(dst[n:])
	return nil
}

func decompressZstd(dst, src []byte) (int, error) {
	dec, err := zstdDecoder()
	if err != nil {
		return 0, fmt.Errorf("zstd decoder: %w", err)
	}
	out, err := dec.DecodeAll(src, dst[:0])
	if err != nil {
		return 0, corrupt("zstd unit", "%v", err)
	}
	if len(out) > len(dst) {
		return 0, corruptUnit(Zstd, len(out), len(dst))
	}
	if len(out) > 0 && &out[0] != &dst[0] {
		copy(dst, out)
	}
	return len(out), nil
}

func corruptUnit(c Codec, got, want int) error {
	return corrupt(c.String()+" unit", "%d bytes, want at most %d", got, want)
}
