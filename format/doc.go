// Package format defines every byte format of a vdisk store: chunk headers, records, entries, leaves, summaries, the
// durable mark, events, the rows of the table and its copy, and the file "format". It also compresses and decompresses
// units. It does no I/O.
//
// The package serves this module only, and promises no stability to anybody outside of it: any identifier may change or
// go in any version. The bytes are stable. A store that one version has written stays readable by all later ones (see
// [StoreVersion]), and testdata/format holds an example of each structure.
//
// No decoder panics, whatever its input holds; only [DecodeSummaryEntry] needs a minimum of bytes. A decoder that
// rejects its input returns an error that matches [ErrCorrupt] or [ErrVersion], or another error that its comment
// names, and that says what is wrong with which structure. A decoder allocates at most in proportion to its input.
// After an error, the value that it returned or filled must not be used.
//
// Functions may be called concurrently. Methods may be called concurrently on one value if none of them changes it. A
// [Compressor] serves one goroutine at a time.
//
// In the drawings, a number in parentheses is a size in bytes, unless bits are named, and a number above a field is its
// offset. All integers are little-endian. A CRC is a CRC-32C (Castagnoli) of 4 bytes.
//
// # Chunk
//
// A chunk is one file of the log, of at most 64 MiB. Its records lie without a gap. Once the chunk is full, its summary
// ends where the file ends.
//
//	0              4096                                End                                size
//	+--------------+--------+--------+-- ... --+--------+--------+-----------------+--------+
//	| chunk header | record | record |         | record | unused | summary entries | footer |
//	+--------------+--------+--------+-- ... --+--------+--------+-----------------+--------+
//
// Offsets and sizes of records are multiples of 16.
//
// # Chunk header
//
//	0                      8             12         16                 24          40        44
//	+----------------------+-------------+----------+------------------+-----------+---------+
//	| "VDISKCHK" (8)       | version (4) | slot (4) | chunk seq (8)    | UUID (16) | CRC (4) | -->
//	+----------------------+-------------+----------+------------------+-----------+---------+
//	44            52        56               64        68              4096
//	+-------------+---------+----------------+---------+-----------------+
//	| durable (8) | CRC (4) | checkpoint (8) | CRC (4) | zero, not read  |
//	+-------------+---------+----------------+---------+-----------------+
//
// Each CRC covers everything before it. Durable and checkpoint are sequence numbers of records (see [ChunkHeader]).
// Durable and its CRC are both 0 if the header says nothing about durability; otherwise a CRC that does not verify is
// damage. A checkpoint whose CRC does not verify says nothing, because older programs take it for padding.
//
// # Record
//
//	0                4                 8                16              24           28          32
//	+----------------+-----------------+----------------+---------------+------------+-----------+
//	| header CRC (4) | payload CRC (4) | sequence (8)   | block (8)     | branch (4) | word (4)  | -->
//	+----------------+-----------------+----------------+---------------+------------+-----------+
//	32                                  size
//	+----------- ... -----------+-- ... --+
//	| payload                   | zeros   |
//	+----------- ... -----------+-- ... --+
//
// The word, from its lowest bit:
//
//	bits 0..3     codec: 0 raw, 1 S2, 2 zstd
//	bits 4..7     kind: 1 data, 2 hole, 3 event, 4 moved
//	bits 8..27    payload length, in bytes
//	bits 28..31   blocks in the unit - 1
//
// The header CRC covers the chunk sequence number (8), the offset in the chunk (4), and bytes 4..32. So a record that
// is left over from an earlier life of the file, or that the disk put in the wrong place, does not verify. The payload
// CRC covers the payload as it is stored.
//
// A record is padded to a multiple of 16 × blocks in the unit. So each block of the unit accounts for the same number
// of bytes of it, a multiple of 16: the block's share.
//
// # Payloads
//
//	        +------------ ... ------------+
//	data    | unit                        |
//	        +------------ ... ------------+
//	        +-----------------------------+
//	hole    | number of blocks (8)        |
//	        +-----------------------------+
//	        +------------ ... ------------+
//	event   | JSON                        |
//	        +------------ ... ------------+
//	        +-----------------------------+----------+-----------+----- ... -----+
//	moved   | entry of first block (8)    | mask (2) | zeros (6) | unit          |
//	        +-----------------------------+----------+-----------+----- ... -----+
//
// A unit is 1 to 16 neighbouring blocks of 4096 bytes that were compressed together, without the zeros at its end (from
// store version 3 on). It does not cross a multiple of 16 blocks. A raw unit is stored whole. No unit takes more bytes
// than its blocks have.
//
// A hole makes its blocks read as zeros. An event is the JSON of an [Event]. Both have codec 0 and one block; an event
// has branch 0 and block 0. A moved record is a copy that the cleaner made of a unit whose entries stay as they are:
// the entry names the unit's old place, and the mask has a bit for each block that was alive.
//
// # Entry
//
// An entry says where the content of one block is, in 8 bytes. 0 is a hole. The bits of all others:
//
//	 63  62           39 38       35 34          31 30         22 21            0
//	+---+---------------+-----------+--------------+-------------+---------------+
//	| 1 | slot          | index     | blocks - 1   | share / 16  | offset / 16   |
//	+---+---------------+-----------+--------------+-------------+---------------+
//
// Offset is where the record begins in the chunk. The record's size is share × blocks. Index is the block's place in
// the unit.
//
// # Leaf
//
// A leaf is the map of 256 blocks of one branch, as of the end of one epoch.
//
//	0         4             5           6              8              40
//	+---------+-------------+-----------+--------------+--------------+-----+-----+-- ...
//	| CRC (4) | version (1) | flags (1) | reserved (2) | changed (32) | run | run |
//	+---------+-------------+-----------+--------------+--------------+-----+-----+-- ...
//
// The CRC covers the rest. Flags and reserved are 0. Changed has one bit for each block, lowest first. Runs follow
// until they have covered 256 blocks:
//
//	head    kind << 6 | count - 1 (1), if count is at most 63; else kind << 6 | 63 (1), and count - 1 (1)
//	place   offset / 16 | share / 16 << 22 (4), and the distance from the slot of the place before, as a
//	        zig-zag varint (1..4)
//
//	                                       +------+
//	kind 0, holes                          | head |
//	                                       +------+
//	                                       +------+-------+-------+-- ...
//	kind 1, single-block units             | head | place | place |        one for each block
//	                                       +------+-------+-------+-- ...
//	                                       +------+-----------------------------+-------+
//	kind 2, neighbours in one unit         | head | (blocks - 1) << 4 | index   | place |
//	                                       +------+-----------------------------+-------+
//	                                       +------+-------+
//	kind 3, single-block units of one      | head | place |                of the first
//	size, end to end in the log            +------+-------+
//
// In kind 2, index is that of the run's first block. The slot before a leaf's first place is 0.
//
// # Summary
//
// A summary lists the records of a full chunk: an entry for each of them, in order, and the footer.
//
//	0                            8            12
//	+----------------------------+------------+
//	| word (8)                   | branch (4) |    entry
//	+----------------------------+------------+
//
//	bits 0..39    first block; of an event, the payload length
//	bits 40..43   blocks in the unit - 1
//	bits 44..47   kind
//	bits 48..63   data, moved: share / 16; hole: number of blocks, at most 256; event: 0
//
//	0         4                12            16          24            28        32                36      64
//	+---------+----------------+-------------+-----------+-------------+---------+-----------------+-------+
//	| CRC (4) | "VDISKSUM" (8) | version (4) | first (8) | records (4) | end (4) | entries CRC (4) | zeros |
//	+---------+----------------+-------------+-----------+-------------+---------+-----------------+-------+
//
// In the footer, first is the sequence number of the first record, and end is where the last record ends. The CRC
// covers the chunk sequence number (8), the size of the file (4), and bytes 4..40. The records have consecutive
// sequence numbers and lie without a gap, so an entry needs neither number nor place.
//
// # Durable mark
//
// The mark says before which sequence number every record is durable. The file "durable" holds two of them, at offsets
// 0 and 4096.
//
//	0         4                12            16          32             40           64
//	+---------+----------------+-------------+-----------+--------------+------------+
//	| CRC (4) | "VDISKDUR" (8) | version (4) | UUID (16) | sequence (8) | zeros (24) |
//	+---------+----------------+-------------+-----------+--------------+------------+
//
// The CRC covers the rest.
//
// # Rows
//
// A row is a value of the table. Package metadata has the buckets and the keys.
//
//	                                   +---------+------ ... ------+
//	volume, snapshot, branch,          | CRC (4) | JSON            |
//	checkpoint, cold mark              +---------+------ ... ------+
//	                                   +---------+---------------+---------+----------+
//	chunk                              | CRC (4) | chunk seq (8) | end (4) | live (4) |
//	                                   +---------+---------------+---------+----------+
//	                                   +---------+---------------+------------------+
//	forwarded chunk                    | CRC (4) | chunk seq (8) | moved blocks (4) |
//	                                   +---------+---------------+------------------+
//	                                   +---------+------------+----------+-----------+-- ...
//	forwards of a region               | CRC (4) | offset (4) | mask (2) | entry (8) |    one for each record
//	                                   +---------+------------+----------+-----------+-- ...
//
// The CRC covers the rest. JSON with a field that this version does not know is damage, because new fields come with a
// new [StoreVersion].
//
// # Copy of the table
//
// The copy is a header and batches of changes. Package metadata has the order of the buckets.
//
//	0                8             12          28        32
//	+----------------+-------------+-----------+---------+
//	| "VDISKCPY" (8) | version (4) | UUID (16) | CRC (4) |                                            header
//	+----------------+-------------+-----------+---------+
//	+------------+----------+------------+------------+---------+---------------+---------+-- ... --+
//	| "CPYB" (4) | kind (4) | number (8) | length (8) | sum (8) | items CRC (4) | CRC (4) | items   |    batch
//	+------------+----------+------------+------------+---------+---------------+---------+-- ... --+
//	+--------+------------+----------------+------------------+-----+-------+
//	| op (1) | bucket (1) | key length (2) | value length (4) | key | value |                         item
//	+--------+------------+----------------+------------------+-----+-------+
//
// The CRC of a batch's head covers the 36 bytes before it and the batch's offset in the file (8). Kinds: 1 part of the
// base, 2 end of the base, 3 changes. Ops: 1 put, 2 removal, 3 patch, 4 puts. A patch is a sequence of three uvarints and
// bytes: how many bytes to copy of the old value, how many to skip, and how many follow to insert. Puts are the changes of
// a leaf: for each run of changed blocks, its first block (1) and the run, as in a leaf.
//
// # Stream
//
// A stream is no part of a store: it carries a snapshot from one to another (docs/streams.md). It is a sequence of
// frames: a header, then units and marks, then the end.
//
//	0             4          5              8            16           20        24
//	+-------------+----------+--------------+------------+------------+---------+-- ... --+
//	| "VDSF" (4)  | kind (1) | reserved (3) | number (8) | length (4) | CRC (4) | payload |    frame
//	+-------------+----------+--------------+------------+------------+---------+-- ... --+
//	+-----------+------------+----------+-----------+------------+-- ... --+
//	| block (8) | blocks (2) | kind (1) | codec (1) | length (4) | unit    |                    item
//	+-----------+------------+----------+-----------+------------+-- ... --+
//	+-----------+-----------+-----------+--------------+
//	| block (8) | units (8) | bytes (8) | SHA-256 (32) |                                        mark, end
//	+-----------+-----------+-----------+--------------+
//
// The CRC covers the first 20 bytes and the payload. The payload of the header is JSON (see [StreamHeader]), and that of
// a units frame is a list of items.
package format
