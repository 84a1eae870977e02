package cow

import (
	"sync"

	"github.com/vdisk/vdisk/format"
	"github.com/vdisk/vdisk/metadata"
)

// image is a version of a leaf on its way to the table: a copy of a dirty leaf
// as it was before a writer went on in a new epoch or generation, or a version
// that the reaper changed. A checkpoint of generation gen or later writes it.
type image struct {
	metadata.Version
	gen uint64
	format.Leaf
}

// pending holds the images that no checkpoint has committed yet.
type pending struct {
	mu     sync.Mutex
	images map[place][]*image // oldest first
	count  int
}

type place struct{ branch, leaf uint32 }

func (p *pending) push(m *image) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.images == nil {
		p.images = make(map[place][]*image)
	}
	k := place{m.Branch, m.Version.Leaf}
	p.images[k] = append(p.images[k], m)
	p.count++
}

// newest finds the image of a leaf with the highest epoch in [from, to], the
// last one made of it, and runs fn on it under the lock. It returns its epoch, or 0.
func (p *pending) newest(branch, index, from, to uint32, fn func(*image)) uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	var best *image
	for _, m := range p.images[place{branch, index}] {
		if m.Epoch >= from && m.Epoch <= to && (best == nil || m.Epoch >= best.Epoch) {
			best = m
		}
	}
	if best == nil {
		return 0
	}
	fn(best)
	return best.Epoch
}

// upTo returns the images of generations up to gen, those of one version in
// the order they were made.
func (p *pending) upTo(gen uint64) []*image {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*image, 0, p.count)
	for _, ms := range p.images {
		for _, m := range ms {
			if m.gen <= gen {
				out = append(out, m)
			}
		}
	}
	return out
}

// dropVersion removes the images of one version.
func (p *pending) dropVersion(v metadata.Version) {
	p.mu.Lock()
	defer p.mu.Unlock()
	k := place{v.Branch, v.Leaf}
	p.filter(k, p.images[k], func(m *image) bool { return m.Version == v })
}

// drop removes the images for which fn says so.
func (p *pending) drop(fn func(*image) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, ms := range p.images {
		p.filter(k, ms, fn)
	}
}

func (p *pending) filter(k place, ms []*image, gone func(*image) bool) {
	kept := make([]*image, 0, len(ms))
	for _, m := range ms {
		if !gone(m) {
			kept = append(kept, m)
		}
	}
	p.count -= len(ms) - len(kept)
	if len(kept) == 0 {
		delete(p.images, k)
	} else {
		p.images[k] = kept
	}
}
