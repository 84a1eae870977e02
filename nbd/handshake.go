package nbd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
)

// errAborted ends a negotiation that the client gave up, which is no error.
var errAborted = errors.New("nbd: negotiation aborted by the client")

// negotiation is one connection before the transmission phase. Everything is read to the byte, since
// what follows belongs to the transmission phase. The connection's deadline bounds it.
type negotiation struct {
	exports  Exports
	conn     net.Conn
	noZeroes bool

	session
	metaExport string // the export that allocation was negotiated for
}

// option is what a client asks for.
type option struct {
	id   uint32
	data []byte
}

// negotiate returns a session with an open export, or an error after which to hang up.
func negotiate(exports Exports, conn net.Conn) (session, error) {
	n := &negotiation{exports: exports, conn: conn}
	if err := n.greet(); err != nil {
		return session{}, err
	}
	for range maxOptions {
		opt, err := n.readOption()
		if err != nil {
			return session{}, err
		}
		if err := n.answer(opt); err != nil {
			return session{}, err
		}
		if n.export != nil {
			return n.session, nil
		}
	}
	return session{}, fmt.Errorf("%w: more than %d options", ErrProtocol, maxOptions)
}

func (n *negotiation) greet() error {
	b := be.AppendUint64(nil, magicInit)
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if err := n.write(b); err != nil {
		return err
	}
	var reply [4]byte
	if err := n.read(reply[:]); err != nil {
		return err
	}
	flags := be.Uint32(reply[:])
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x", ErrProtocol, flags)
	}
	n.noZeroes = flags&flagNoZeroes != 0
	return nil
}

func (n *negotiation) readOption() (option, error) {
	var head [optionLen]byte
	if err := n.read(head[:]); err != nil {
		return option{}, err
	}
	if magic := be.Uint64(head[:]); magic != magicOption {
		return option{}, fmt.Errorf("%w: option magic %#x", ErrProtocol, magic)
	}
	id, length := be.Uint32(head[8:]), be.Uint32(head[12:])
	if length > maxOptionLen {
		// Best effort: the client may not listen, and what it still sends is not read.
		_ = n.write(appendOptReply(nil, id, repErrTooBig, "option too long"))
		return option{}, fmt.Errorf("%w: option %d has %d bytes", ErrProtocol, id, length)
	}
	opt := option{id: id, data: make([]byte, length)}
	return opt, n.read(opt.data)
}

// answer answers opt. After GO and EXPORT_NAME, if they succeed, n.export is set.
func (n *negotiation) answer(opt option) error {
	switch opt.id {
	case optExportName:
		return n.exportName(opt)
	case optAbort:
		_ = n.reply(opt, repAck) // the client need not wait for it
		return errAborted
	case optList:
		return n.list(opt)
	case optInfo, optGo:
		return n.info(opt)
	case optStructuredReply:
		if len(opt.data) != 0 {
			return n.refuse(opt, repErrInvalid, "STRUCTURED_REPLY takes no data")
		}
		n.structured = true
		return n.reply(opt, repAck)
	case optListMeta, optSetMeta:
		return n.meta(opt)
	}
	return n.refuse(opt, repErrUnsup, "option not supported")
}

// exportName is the old way to begin; it has no error reply but hanging up.
func (n *negotiation) exportName(opt option) error {
	if len(opt.data) > maxNameLen {
		return fmt.Errorf("%w: export name of %d bytes", ErrProtocol, len(opt.data))
	}
	_, export, err := n.open(string(opt.data))
	if err != nil {
		return err
	}
	b := be.AppendUint64(nil, uint64(export.Device.Size()))
	b = be.AppendUint16(b, n.transmissionFlags(export))
	if !n.noZeroes {
		b = append(b, make([]byte, exportZeroes)...)
	}
	return n.begin(string(opt.data), export, b)
}

// begin sends the last reply of a negotiation and makes export the session's.
func (n *negotiation) begin(name string, export *Export, reply []byte) error {
	if err := n.write(reply); err != nil {
		return errors.Join(err, export.close())
	}
	n.export = export
	n.allocation = n.allocation && n.metaExport == name
	return nil
}

// open opens an export by name; the empty name stands for the only one. It returns the full name.
func (n *negotiation) open(name string) (string, *Export, error) {
	if name == "" {
		names, err := n.exports.List()
		if err != nil {
			return "", nil, err
		}
		if len(names) != 1 {
			return "", nil, fmt.Errorf("nbd: %d exports, and none is named: %w", len(names), fs.ErrNotExist)
		}
		name = names[0]
	}
	export, err := n.exports.Open(name)
	if err != nil {
		return "", nil, fmt.Errorf("nbd: open export %q: %w", name, err)
	}
	return name, export, nil
}

func (n *negotiation) list(opt option) error {
	if len(opt.data) != 0 {
		return n.refuse(opt, repErrInvalid, "LIST takes no data")
	}
	names, err := n.exports.List()
	if err != nil {
		return n.refuse(opt, repErrPlatform, err.Error())
	}
	var b []byte
	for _, name := range names {
		b = appendOptReply(b, opt.id, repServer, u32(uint32(len(name))), name)
	}
	return n.write(appendOptReply(b, opt.id, repAck))
}

// info answers INFO and GO: name, and the kinds of information that the client wants.
func (n *negotiation) info(opt option) error {
	d := decoder{b: opt.data}
	asked := d.str()
	kinds := map[uint16]bool{}
	for range d.u16() {
		kinds[d.u16()] = true
	}
	if !d.done() {
		return n.refuse(opt, repErrInvalid, "malformed INFO or GO")
	}
	name, export, err := n.open(asked)
	if err != nil {
		return n.refuseOpen(opt, err)
	}
	b := appendOptReply(nil, opt.id, repInfo,
		u16(infoExport), u64(uint64(export.Device.Size())), u16(n.transmissionFlags(export)))
	b = appendOptReply(b, opt.id, repInfo,
		u16(infoBlockSize), u32(orDefault(export.MinBlock, 1)), u32(orDefault(export.PreferredBlock, 4096)), u32(MaxPayload))
	if kinds[infoName] {
		b = appendOptReply(b, opt.id, repInfo, u16(infoName), name)
	}
	if kinds[infoDescription] && export.Description != "" {
		b = appendOptReply(b, opt.id, repInfo, u16(infoDescription), clip(export.Description))
	}
	b = appendOptReply(b, opt.id, repAck)
	if opt.id == optGo {
		return n.begin(asked, export, b)
	}
	closed := export.close() // before the reply, after which a client may expect it to be free
	return errors.Join(closed, n.write(b))
}

func (n *negotiation) transmissionFlags(e *Export) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagMultiConn | flagSendCache)
	if e.ReadOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagSendTrim | flagSendWriteZeroes | flagSendFastZero
	}
	if n.structured {
		flags |= flagSendDF
	}
	return flags
}

// meta answers LIST_META_CONTEXT and SET_META_CONTEXT: export name, and queries. Whether there is
// such an export is found out by GO, since only that opens one.
func (n *negotiation) meta(opt option) error {
	if !n.structured {
		return n.refuse(opt, repErrInvalid, "metadata contexts need structured replies")
	}
	set := opt.id == optSetMeta
	if set { // also where it fails: it replaces what was set
		n.allocation = false
	}
	d := decoder{b: opt.data}
	name := d.str()
	count := d.u32()
	found := !set && count == 0 // list all
	for range count {
		query := d.str()
		if d.failed {
			break
		}
		found = found || query == contextAllocation || !set && query == "base:"
	}
	if !d.done() {
		return n.refuse(opt, repErrInvalid, "malformed metadata context query")
	}
	var b []byte
	if found {
		id := uint32(0) // not meaningful in a list
		if set {
			id = contextAllocationID
			n.allocation, n.metaExport = true, name
		}
		b = appendOptReply(b, opt.id, repMetaContext, u32(id), contextAllocation)
	}
	return n.write(appendOptReply(b, opt.id, repAck))
}

// refuseOpen tells the client why an export cannot be opened.
func (n *negotiation) refuseOpen(opt option, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return n.refuse(opt, repErrUnknown, "no such export")
	case errors.Is(err, fs.ErrPermission):
		return n.refuse(opt, repErrPolicy, "not permitted")
	case errors.Is(err, ErrServerClosed):
		return n.refuse(opt, repErrShutdown, "shutting down")
	}
	return n.refuse(opt, repErrPlatform, err.Error())
}

// refuse answers with an error, after which the client may go on.
func (n *negotiation) refuse(opt option, typ uint32, text string) error {
	return n.reply(opt, typ, clip(text))
}

func (n *negotiation) reply(opt option, typ uint32, data ...string) error {
	return n.write(appendOptReply(nil, opt.id, typ, data...))
}

func (n *negotiation) read(p []byte) error {
	if _, err := io.ReadFull(n.conn, p); err != nil {
		return fmt.Errorf("nbd: negotiation: %w", err)
	}
	return nil
}

func (n *negotiation) write(p []byte) error {
	if _, err := n.conn.Write(p); err != nil {
		return fmt.Errorf("nbd: negotiation: %w", err)
	}
	return nil
}

// clip bounds a string as the specification wants it.
func clip(s string) string {
	if len(s) > maxNameLen {
		s = s[:maxNameLen]
	}
	return strings.ToValidUTF8(s, "?")
}

func orDefault(v, def int) uint32 {
	if v == 0 {
		return uint32(def)
	}
	return uint32(v)
}

// decoder takes an option's data apart; failed is set when there is too little of it.
type decoder struct {
	b      []byte
	failed bool
}

// take returns the next n bytes, or nil and fails.
func (d *decoder) take(n int) []byte {
	if d.failed || n > len(d.b) {
		d.failed = true
		return nil
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) u16() uint16 {
	if b := d.take(2); b != nil {
		return be.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.take(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

// str is a string with its length before it.
func (d *decoder) str() string {
	n := d.u32()
	if n > maxNameLen {
		d.failed = true
	}
	return string(d.take(int(n)))
}

// done reports whether all went well and nothing is left.
func (d *decoder) done() bool { return !d.failed && len(d.b) == 0 }
