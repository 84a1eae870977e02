package cow

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/vdisk/vdisk/format"
)

// imageSource is a content that is handed out in odd pieces, without its blocks of zeros.
type imageSource struct {
	p  []byte
	at int
}

func (s *imageSource) Size() int64 { return int64(len(s.p)) }

func (s *imageSource) Next(p []byte) (int, int64, error) {
	for s.at < len(s.p) {
		n := copy(p, s.p[s.at:min(len(s.p), s.at+3*format.BlockSize)])
		s.at += n
		if !format.IsZero(p[:n]) {
			return n, int64(s.at - n), nil
		}
	}
	return 0, 0, io.EOF
}

func contentOfRef(t *testing.T, s *Store, r Ref) ([]byte, error) {
	t.Helper()
	d, err := s.OpenDevice(r, true)
	must(t, err)
	defer d.Close()
	p := make([]byte, d.Size())
	_, err = d.ReadAt(p, 0)
	return p, err
}

// givenUp is a content whose sender gives up at once.
type givenUp struct{ imageSource }

func (*givenUp) Next([]byte) (int, int64, error) { return 0, 0, context.Canceled }

// TestRepairIsGivenUp: a repair reads its source also where nothing is damaged. Otherwise it would go on behind the back
// of a client that was interrupted.
func TestRepairIsGivenUp(t *testing.T) {
	t.Parallel()
	s, _, _ := scrubbed(t, Options{})
	want, err := contentOfRef(t, s, Ref{Volume: "v"})
	must(t, err)
	if rep, err := s.Repair(t.Context(), "v", &givenUp{imageSource{p: want}}); !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v", rep, err)
	}
	must(t, s.Close())
}

// A repair writes over damaged blocks of the volume, and over no others, whatever the image has there. Snapshots that
// share the damage are named.
func TestRepair(t *testing.T) {
	t.Parallel()
	for _, wrong := range []bool{false, true} {
		s, _, _ := scrubbed(t, Options{})
		v := Ref{Volume: "v"}
		want, err := contentOfRef(t, s, v)
		must(t, err)
		bad := []uint64{2, 300, 700, 1024}
		for _, b := range bad {
			rot(t, s, v, b)
		}
		image := bytes.Clone(want)
		if wrong {
			image = randomBytes(len(want), 99)
		}
		clear(image[300*format.BlockSize:][:format.BlockSize]) // zeros take the place of what was lost, too
		clear(want[300*format.BlockSize:][:format.BlockSize])
		rep, err := s.Repair(context.Background(), "v", &imageSource{p: image})
		must(t, err)
		var blocks []uint64
		for _, l := range rep.Written {
			for off := l.Offset; off < l.Offset+l.Length; off += format.BlockSize {
				blocks = append(blocks, uint64(off)/format.BlockSize)
				copy(want[off:][:format.BlockSize], image[off:])
			}
		}
		if !slices.Equal(blocks, bad) || rep.Bytes != int64(len(bad))*format.BlockSize || len(rep.Left) > 0 {
			t.Errorf("blocks %v were written: %+v", blocks, rep)
		}
		others, mended := []int64{2, 300, 700}, []int64(nil)
		if !wrong {
			others, mended = []int64{300}, []int64{2, 700}
		}
		if !isBlocksOf(Ref{"v", "a"}, rep.Others, others) || !isBlocksOf(Ref{"v", "a"}, rep.Mended, mended) {
			t.Errorf("others have lost %v, and were mended: %v", rep.Others, rep.Mended)
		}
		got, err := contentOfRef(t, s, v)
		if err != nil || !bytes.Equal(got, want) {
			t.Error("the volume reads otherwise:", err)
		}
		if _, err := contentOfRef(t, s, Ref{"v", "a"}); !errors.Is(err, ErrCorrupt) {
			t.Error("the snapshot reads:", err)
		}
		must(t, s.Remove(Ref{"v", "a"}, false))
		for range 5 {
			must(t, s.Checkpoint())
		}
		if r := checkData(t, s); r.Corrupt+r.Unreadable > 0 {
			t.Errorf("%+v", r)
		}
		if rep, err = s.Repair(context.Background(), "v", &imageSource{p: image}); err != nil || rep.Bytes > 0 {
			t.Errorf("a second repair: %+v, %v", rep, err)
		}
		must(t, s.Close())
	}
}

// isBlocksOf reports whether ranges are these blocks of a volume or snapshot.
func isBlocksOf(ref Ref, list []Lost, blocks []int64) bool {
	return slices.EqualFunc(list, blocks, func(l Lost, b int64) bool { return l == Lost{ref, b * format.BlockSize, format.BlockSize} })
}

// An image that is shorter than the volume repairs what lies inside it, and is refused if something lies behind.
func TestRepairFromShortImage(t *testing.T) {
	t.Parallel()
	s, _, _ := scrubbed(t, Options{})
	v := Ref{Volume: "v"}
	want, err := contentOfRef(t, s, v)
	must(t, err)
	rot(t, s, v, 300)
	rot(t, s, v, 700)
	short := &imageSource{p: want[:700*format.BlockSize]}
	rot(t, s, v, 1024)
	rep, err := s.Repair(context.Background(), "v", short)
	if !errors.Is(err, ErrInvalid) || rep.Bytes > 0 || !strings.Contains(err.Error(), "in 8192 bytes: v 2867200+4096, v 4194304+4096: ") {
		t.Errorf("%+v, %v", rep, err)
	}
	rot(t, s, v, 1024) // flips the same bit
	rep, err = s.Repair(context.Background(), "v", &imageSource{p: want[:701*format.BlockSize]})
	if err != nil || rep.Bytes != 2*format.BlockSize {
		t.Errorf("%+v, %v", rep, err)
	}
	if got, err := contentOfRef(t, s, v); err != nil || !bytes.Equal(got, want) {
		t.Error(err)
	}
	must(t, s.Close())
}
