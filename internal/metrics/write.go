package metrics

import (
	"io"
	"math/bits"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"github.com/vdisk/vdisk/ublk"
)

// ContentType is that of what Write writes.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// Write writes a reading of this process's store, and the counters of the process, in Prometheus's text format.
func Write(w io.Writer, r Reading) error {
	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		collector{r}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := registry.Register(c); err != nil {
			return err
		}
	}
	families, err := registry.Gather()
	if err != nil {
		return err
	}
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(w, f); err != nil {
			return err
		}
	}
	return nil
}

// collector gives one reading to a registry.
type collector struct{ r Reading }

// family is metrics of one name that have no labels of their own.
type family struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*Reading) float64
}

func gauge(name, help string, value func(*Reading) float64) family {
	return family{prometheus.NewDesc("vdisk_"+name, help, nil, nil), prometheus.GaugeValue, value}
}

func counter(name, help string, value func(*Reading) float64) family {
	return family{prometheus.NewDesc("vdisk_"+name, help, nil, nil), prometheus.CounterValue, value}
}

func is(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// unix returns a time as Prometheus has it; 0: there is none.
func unix(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / 1e9
}

// families are the metrics of the store that are one number.
var families = []family{
	gauge("store_start_time_seconds", "When the owner opened the store, in Unix time.", func(r *Reading) float64 { return unix(r.Started) }),
	gauge("store_failed", "1 if writing has failed for good.", func(r *Reading) float64 { return is(r.Counters.Failed) }),
	gauge("store_volumes", "Volumes.", func(r *Reading) float64 { return float64(r.Info.Volumes) }),
	gauge("store_snapshots", "Snapshots.", func(r *Reading) float64 { return float64(r.Info.Snapshots) }),
	gauge("store_chunks", "Files of the log.", func(r *Reading) float64 { return float64(r.Info.Chunks) }),
	gauge("store_chunk_file_bytes", "Size of the files of the log.", func(r *Reading) float64 { return float64(r.Counters.FileBytes) }),
	gauge("store_record_bytes", "Records in the files of the log.", func(r *Reading) float64 { return float64(r.Info.ChunkBytes) }),
	gauge("store_live_bytes", "Records that volumes and snapshots refer to.", func(r *Reading) float64 { return float64(r.Info.LiveBytes) }),
	gauge("store_spare_bytes", "Files of dead chunks that are kept to be used again.", func(r *Reading) float64 { return float64(r.Info.SpareBytes) }),
	gauge("store_table_bytes", "Size of the table of blocks.", func(r *Reading) float64 { return float64(r.Info.MetaBytes) }),
	gauge("store_table_copy_bytes", "Size of the copy of the table; 0: there is none.", func(r *Reading) float64 { return float64(r.Info.CopyBytes) }),
	gauge("store_reserve_bytes", "Space that is kept for a full disk.", func(r *Reading) float64 { return float64(r.Info.ReserveBytes) }),
	gauge("store_free_bytes", "Free space of the file system.", func(r *Reading) float64 { return float64(r.Info.FreeBytes) }),
	gauge("store_room_bytes", "How much the files of the log can still grow.", func(r *Reading) float64 { return float64(r.Counters.RoomBytes) }),
	gauge("store_limit_bytes", "The limit on the files of the log; 0: none.", func(r *Reading) float64 { return float64(r.Counters.LimitBytes) }),
	gauge("store_damaged_places", "Places of the store that are known to be damaged.", func(r *Reading) float64 { return float64(r.Counters.DamagedPlaces) }),
	counter("store_written_bytes_total", "Data that was written to volumes, before compression.", func(r *Reading) float64 { return float64(r.Counters.WrittenBytes) }),
	counter("store_compressed_bytes_total", "Records that the data written to volumes became.", func(r *Reading) float64 { return float64(r.Counters.CompressedBytes) }),

	counter("log_records_total", "Records of the log, over the life of the store.", func(r *Reading) float64 { return float64(r.Counters.Records) }),
	counter("log_durable_records_total", "Records that a power cut leaves, over the life of the store.", func(r *Reading) float64 { return float64(r.Counters.DurableRecords) }),
	counter("log_appended_bytes_total", "Bytes of records, by writers, cleaner and cold pass.", func(r *Reading) float64 { return float64(r.Counters.AppendedBytes) }),
	gauge("log_replay_bytes", "Records since the last checkpoint began.", func(r *Reading) float64 { return float64(r.Counters.ReplayBytes) }),
	counter("checkpoint_failures_total", "Checkpoints that failed.", func(r *Reading) float64 { return float64(r.Counters.CheckpointFailures) }),
	gauge("checkpoint_last_timestamp_seconds", "When the last checkpoint was made, in Unix time; 0: none was yet.", func(r *Reading) float64 { return unix(r.Counters.LastCheckpoint) }),
	counter("cleaner_chunks_total", "Chunks that were cleaned.", func(r *Reading) float64 { return float64(r.Counters.CleanedChunks) }),
	counter("cleaner_moved_bytes_total", "Live data that the cleaner or the cold pass wrote again.", func(r *Reading) float64 { return float64(r.Counters.MovedBytes) }),
	counter("cleaner_reclaimed_bytes_total", "Bytes of dead chunks whose files were removed or used again.", func(r *Reading) float64 { return float64(r.Counters.ReclaimedBytes) }),
	gauge("cleaner_running", "1 while a chunk is being cleaned.", func(r *Reading) float64 { return is(r.Counters.Cleaning) }),
	gauge("cleaner_writers_paced", "1 while writers are held back, because room is short.", func(r *Reading) float64 { return is(r.Counters.Paced) }),

	gauge("scrub_running", "1 while a scrub is at work.", func(r *Reading) float64 { return is(r.Info.Scrub.Active && !r.Info.Scrub.Paused) }),
	gauge("scrub_progress_ratio", "How far the scrub under way is, from 0 to 1.", scrubProgress),
	gauge("scrub_read_bytes", "Records that the present or the last scrub has verified.", func(r *Reading) float64 { return float64(scrub(r).Bytes) }),
	gauge("scrub_damaged_records", "Records that did not verify, of the present or the last scrub.", func(r *Reading) float64 { return float64(scrub(r).Damaged) }),
	gauge("scrub_unreadable_records", "Records that the disk could not read, of the present or the last scrub.", func(r *Reading) float64 { return float64(scrub(r).Unreadable) }),
	gauge("scrub_last_timestamp_seconds", "When the last whole scrub ended, in Unix time; 0: none did yet.", func(r *Reading) float64 {
		if last := r.Info.Scrub.Last; last != nil {
			return unix(last.Ended)
		}
		return 0
	}),
	gauge("nbd_services", "NBD services.", func(r *Reading) float64 { return float64(r.Services) }),
	gauge("nbd_clients", "Connections of NBD clients.", func(r *Reading) float64 { return float64(r.Clients) }),
}

func labelled(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("vdisk_"+name, help, labels, nil)
}

// The metrics that have labels, or more than one number.
var (
	buildInfo      = labelled("build_info", "1; the version of the program.", "version")
	storeInfo      = labelled("store_info", "1; the folder, the identity and the format of the store.", "store", "uuid", "format")
	syncTime       = labelled("log_sync_duration_seconds", "How often, and how long, chunk files were synced.")
	checkpointTime = labelled("checkpoint_duration_seconds", "Checkpoints that were made, and how long they took.")
	cacheLookups   = labelled("cache_lookups_total", "Look-ups in a cache.", "cache")
	cacheMisses    = labelled("cache_misses_total", "Look-ups for which something had to be read or unpacked.", "cache")
	devices        = labelled("devices", "Block devices.", "state")

	volumeSize       = labelled("volume_size_bytes", "Size of the volume.", "volume")
	volumeSnapshots  = labelled("volume_snapshots", "Snapshots of the volume.", "volume")
	volumeOpen       = labelled("volume_open", "How often the volume or a snapshot of it is open.", "volume")
	volumeWritten    = labelled("volume_written_bytes_total", "Data that was written to the volume, before compression.", "volume")
	volumeCompressed = labelled("volume_compressed_bytes_total", "Records that the data written to the volume became.", "volume")

	operationCount = labelled("volume_operations_total", "Requests that were answered.", "volume", "snapshot", "operation")
	operationBytes = labelled("volume_bytes_total", "Bytes of requests that succeeded.", "volume", "snapshot", "operation")
	operationTime  = labelled("volume_operation_duration_seconds", "Time from the arrival of a request to its answer.", "volume", "snapshot", "operation")
	errorCount     = labelled("volume_errors_total", "Requests that failed.", "volume", "snapshot", "kind")
)

// Describe is that of prometheus.Collector. It describes nothing: the registry then takes what Collect sends.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect is that of prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	r, n := &c.r, &c.r.Counters
	for _, f := range families {
		send(f.desc, f.kind, f.value(r))
	}
	send(buildInfo, prometheus.GaugeValue, 1, r.Version)
	// A path may have any bytes, and a label may not. Names of volumes are ASCII.
	send(storeInfo, prometheus.GaugeValue, 1, strings.ToValidUTF8(r.Store, "\uFFFD"), r.Info.UUID, strconv.Itoa(r.Info.Version))
	out <- prometheus.MustNewConstSummary(syncTime, n.Syncs, n.SyncTime.Seconds(), nil)
	out <- prometheus.MustNewConstSummary(checkpointTime, n.Checkpoints, n.CheckpointTime.Seconds(), nil)
	send(cacheLookups, prometheus.CounterValue, float64(n.MapLookups), "map")
	send(cacheLookups, prometheus.CounterValue, float64(n.UnitHits+n.UnitMisses), "unit")
	send(cacheMisses, prometheus.CounterValue, float64(n.MapLoads), "map")
	send(cacheMisses, prometheus.CounterValue, float64(n.UnitMisses), "unit")
	send(devices, prometheus.GaugeValue, float64(r.Served), "served")
	send(devices, prometheus.GaugeValue, float64(r.Waiting), "waiting")
	for _, v := range n.Volumes {
		send(volumeSize, prometheus.GaugeValue, float64(v.Size), v.Name)
		send(volumeSnapshots, prometheus.GaugeValue, float64(v.Snapshots), v.Name)
		send(volumeOpen, prometheus.GaugeValue, float64(v.Open), v.Name)
		send(volumeWritten, prometheus.CounterValue, float64(v.WrittenBytes), v.Name)
		send(volumeCompressed, prometheus.CounterValue, float64(v.CompressedBytes), v.Name)
	}
	for i := range r.Traffic {
		collectTraffic(out, &r.Traffic[i])
	}
}

func collectTraffic(out chan<- prometheus.Metric, t *Traffic) {
	for i := range t.Ops {
		o := &t.Ops[i]
		labels := []string{t.Ref.Volume, t.Ref.Snapshot, Operations[i].String()}
		out <- prometheus.MustNewConstMetric(operationCount, prometheus.CounterValue, float64(o.Requests), labels...)
		out <- prometheus.MustNewConstMetric(operationBytes, prometheus.CounterValue, float64(o.Bytes), labels...)
		if o.Requests > 0 {
			n, buckets := coarse(o.Latency)
			out <- prometheus.MustNewConstHistogram(operationTime, n, o.Time.Seconds(), buckets, labels...)
		}
	}
	for i, n := range t.Errors {
		out <- prometheus.MustNewConstMetric(errorCount, prometheus.CounterValue, float64(n), t.Ref.Volume, t.Ref.Snapshot, Kinds[i])
	}
}

// The buckets of the histograms end at the powers of two of nanoseconds from 2^firstBucket to 2^lastBucket.
const firstBucket, lastBucket = 12, 34

// coarse returns the number of all durations, and how many are below each limit. As powers of two are limits of the fine
// buckets, too, each of these lies on one side.
func coarse(fine [][2]uint64) (n uint64, below map[float64]uint64) {
	var counts [lastBucket + 1]uint64
	var h ublk.Histogram
	for _, b := range fine {
		n += b[1]
		if i := bits.Len64(uint64(h.Bucket(int(b[0])))); i <= lastBucket { // it is below 2^i
			counts[max(i, firstBucket)] += b[1]
		}
	}
	below = make(map[float64]uint64, lastBucket-firstBucket+1)
	var sum uint64
	for i := firstBucket; i <= lastBucket; i++ {
		sum += counts[i]
		below[float64(uint64(1)<<i)/1e9] = sum
	}
	return n, below
}
