package metrics

import "github.com/vdisk/vdisk/cow"

// scrub returns the scrub under way or paused, otherwise the last one, otherwise an empty one.
func scrub(r *Reading) cow.ScrubRun {
	switch s := &r.Info.Scrub; {
	case s.Now != nil:
		return *s.Now
	case s.Last != nil:
		return *s.Last
	}
	return cow.ScrubRun{}
}

func scrubProgress(r *Reading) float64 {
	now := r.Info.Scrub.Now
	if now == nil || now.Total <= 0 {
		return 0
	}
	return min(1, float64(now.Leaves)/float64(now.Total))
}
