package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"time"
)

// errAborted ends a negotiation that the client gave up. It does not count as an error.
var errAborted = errors.New("nbd: negotiation aborted by the client")

// negotiation is a connection before the transmission phase. It never reads ahead, since what follows belongs to the
// transmission phase.
type negotiation struct {
	exports  Exports
	conn     net.Conn
	timeout  time.Duration // for each step of the client
	by       time.Time     // the latest end of a step, unless it is zero
	failed   func(error)   // called with errors of exports
	closing  func() bool   // reports whether the server is shutting down
	noZeroes bool

	tls     *tls.Config  // not nil: the server insists on TLS, and the next two are set
	proven  func() error // called once TLS has begun
	sysRead func(fd int, p []byte) (int, error)

	session
	selected   []string // metadata contexts
	metaExport string   // the export for which they were selected
}

// option is a client's option with its data.
type option struct {
	id   uint32
	data []byte
}

// run returns a session with an open export, or an error, after which the connection is closed. The number of options
// is not limited, because a client that lists the exports sends several for each.
func (n *negotiation) run() (s session, err error) {
	defer recovered(&err)
	if n.tls != nil {
		n.by = time.Now().Add(n.timeout)
	}
	if err := n.greet(); err != nil {
		return session{}, err
	}
	if n.tls != nil {
		if err := n.startTLS(); err != nil {
			return session{}, err
		}
	}
	for {
		opt, err := n.readOption()
		if err != nil {
			return session{}, err
		}
		if n.closing() && opt.id != optAbort && opt.id != optExportName {
			_ = n.refuse(opt, repErrShutdown, ErrServerClosed.Error()) // the client need not wait for it
			return session{}, ErrServerClosed
		}
		if err := n.answer(opt); err != nil {
			return session{}, err
		}
		if n.export != nil {
			return n.session, nil
		}
	}
}

// within limits how long the connection may take until the next call.
func (n *negotiation) within() error {
	end := time.Now().Add(n.timeout)
	if !n.by.IsZero() && n.by.Before(end) {
		end = n.by
	}
	err := n.conn.SetDeadline(end)
	if err == nil && n.closing() { // after the deadline was set: Server.close may have set its own before
		err = n.conn.SetDeadline(time.Now().Add(closingTimeout))
	}
	if err != nil {
		return fmt.Errorf("nbd: negotiation: %w", err)
	}
	return nil
}

func (n *negotiation) greet() error {
	b := be.AppendUint64(nil, magicInit)
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if err := n.write(b); err != nil { // write's deadline also limits the read
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
	if err := n.within(); err != nil {
		return option{}, err
	}
	if err := n.read(head[:]); err != nil {
		return option{}, err
	}
	if magic := be.Uint64(head[:]); magic != magicOption {
		return option{}, fmt.Errorf("%w: option magic %#x", ErrProtocol, magic)
	}
	id, length := be.Uint32(head[8:]), be.Uint32(head[12:])
	if length > maxOptionLen {
		// The client may not read this reply, and what it still sends is not read.
		_ = n.write(appendOptReply(nil, id, repErrTooBig, "option too long"))
		return option{}, fmt.Errorf("%w: option %d has %d bytes", ErrProtocol, id, length)
	}
	opt := option{id: id, data: make([]byte, length)}
	err := n.read(opt.data)
	if errors.Is(err, io.EOF) { // none of the data came, and it was announced
		err = fmt.Errorf("nbd: negotiation: %w", io.ErrUnexpectedEOF)
	}
	return opt, err
}

// answer answers opt. After a successful GO or EXPORT_NAME, n.export is set.
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
	case optStartTLS:
		if n.tls != nil {
			return n.refuse(opt, repErrInvalid, "TLS has begun already")
		}
		return n.refuse(opt, repErrPolicy, "this server has no TLS")
	case optStructuredReply:
		if len(opt.data) != 0 {
			return n.refuse(opt, repErrInvalid, "STRUCTURED_REPLY takes no data")
		}
		if n.extended {
			return n.refuse(opt, repErrExtended, "extended headers have been negotiated")
		}
		n.structured = true
		return n.reply(opt, repAck)
	case optExtendedHeaders:
		if len(opt.data) != 0 {
			return n.refuse(opt, repErrInvalid, "EXTENDED_HEADERS takes no data")
		}
		n.structured, n.extended = true, true
		return n.reply(opt, repAck)
	case optListMeta, optSetMeta:
		return n.meta(opt)
	}
	return n.refuse(opt, repErrUnsup, "option not supported")
}

// exportName handles EXPORT_NAME, the old way to start. Its only error reply is closing the connection.
func (n *negotiation) exportName(opt option) error {
	if n.extended {
		return fmt.Errorf("%w: EXPORT_NAME after EXTENDED_HEADERS", ErrProtocol)
	}
	if len(opt.data) > maxNameLen {
		return fmt.Errorf("%w: export name of %d bytes", ErrProtocol, len(opt.data))
	}
	export, info, err := n.open(string(opt.data))
	if err != nil {
		n.failed(err)
		return fmt.Errorf("nbd: open export %q: %w", opt.data, err)
	}
	contexts, err := n.openContexts(string(opt.data), export)
	if err != nil {
		n.failed(err)
		return errors.Join(fmt.Errorf("nbd: open export %q: %w", opt.data, err), export.close())
	}
	b := be.AppendUint64(nil, uint64(info.Size))
	b = be.AppendUint16(b, n.transmissionFlags(info))
	if !n.noZeroes {
		b = append(b, make([]byte, exportZeroes)...)
	}
	return n.begin(string(opt.data), export, contexts, info, b)
}

// begin sends the last reply of a negotiation, and makes export the session's export.
func (n *negotiation) begin(name string, export *Export, contexts []Context, info Info, reply []byte) error {
	if err := n.write(reply); err != nil {
		return errors.Join(err, closeContexts(contexts), export.close())
	}
	n.export, n.contexts, n.name, n.size = export, contexts, name, uint64(info.Size)
	if len(contexts) > 0 {
		n.contextNames = n.selected
	}
	return nil
}

func (n *negotiation) open(name string) (export *Export, info Info, err error) {
	defer func() {
		if err != nil && export != nil { // export.info has panicked, or the server is shutting down
			err = errors.Join(err, export.close())
		}
	}()
	defer recovered(&err)
	if export, err = n.exports.Open(name); err != nil {
		return nil, info, err
	}
	if info = export.info(); n.closing() {
		return export, info, ErrServerClosed
	}
	return export, info, nil
}

func (n *negotiation) describe(name string) (info Info, err error) {
	defer recovered(&err)
	return n.exports.Describe(name)
}

// listed returns the exports to advertise.
func (n *negotiation) listed() (infos []Info, err error) {
	defer recovered(&err)
	if l, ok := n.exports.(InfoLister); ok {
		return l.ListInfo()
	}
	names, err := n.exports.List()
	for _, name := range names {
		infos = append(infos, Info{Name: name})
	}
	return infos, err
}

func (n *negotiation) list(opt option) error {
	if len(opt.data) != 0 {
		return n.refuse(opt, repErrInvalid, "LIST takes no data")
	}
	infos, err := n.listed()
	if err != nil {
		return n.refuseOpen(opt, err)
	}
	var b []byte
	for _, info := range infos {
		b = appendOptReply(b, opt.id, repServer, u32(uint32(len(info.Name))), info.Name, clip(info.Description, maxNameLen))
	}
	return n.write(appendOptReply(b, opt.id, repAck))
}

// info answers INFO and GO, whose data is a name and the kinds of information that the client wants.
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
	if opt.id == optInfo {
		info, err := n.describe(asked)
		if err != nil {
			return n.refuseOpen(opt, err)
		}
		return n.write(n.infoReply(opt, info, kinds))
	}
	export, info, err := n.open(asked)
	if err != nil {
		return n.refuseOpen(opt, err)
	}
	contexts, err := n.openContexts(asked, export)
	if err != nil {
		return errors.Join(n.refuseOpen(opt, err), export.close())
	}
	return n.begin(asked, export, contexts, info, n.infoReply(opt, info, kinds))
}

func (n *negotiation) infoReply(opt option, info Info, kinds map[uint16]bool) []byte {
	b := appendOptReply(nil, opt.id, repInfo,
		u16(infoExport), u64(uint64(info.Size)), u16(n.transmissionFlags(info)))
	b = appendOptReply(b, opt.id, repInfo,
		u16(infoBlockSize), u32(orDefault(info.MinBlock, 1)), u32(orDefault(info.PreferredBlock, 4096)), u32(MaxPayload))
	if kinds[infoName] {
		b = appendOptReply(b, opt.id, repInfo, u16(infoName), clip(info.Name, maxNameLen))
	}
	if kinds[infoDescription] && info.Description != "" {
		b = appendOptReply(b, opt.id, repInfo, u16(infoDescription), clip(info.Description, maxNameLen))
	}
	return appendOptReply(b, opt.id, repAck)
}

func (n *negotiation) transmissionFlags(info Info) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagSendCache)
	if !info.NoMultiConn {
		flags |= flagMultiConn
	}
	if info.ReadOnly {
		flags |= flagReadOnly
	} else {
		flags |= flagSendTrim | flagSendWriteZeroes | flagSendFastZero
	}
	if n.structured {
		flags |= flagSendDF
	}
	return flags
}

// refuseOpen tells the client why an export cannot be opened or described, or why the exports cannot be listed.
func (n *negotiation) refuseOpen(opt option, err error) error {
	n.failed(err)
	typ := uint32(repErrPlatform)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		typ = repErrUnknown
	case errors.Is(err, fs.ErrPermission), errors.Is(err, ErrTooManyConnections):
		typ = repErrPolicy
	case errors.Is(err, ErrServerClosed):
		typ = repErrShutdown
	}
	return n.refuse(opt, typ, err.Error())
}

// refuse answers with an error. The client may continue the negotiation.
func (n *negotiation) refuse(opt option, typ uint32, text string) error {
	return n.reply(opt, typ, clip(text, maxNameLen))
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
	if err := n.within(); err != nil {
		return err
	}
	if _, err := n.conn.Write(p); err != nil {
		return fmt.Errorf("nbd: negotiation: %w", err)
	}
	return nil
}

// clip shortens a string to limit bytes, and makes it valid UTF-8.
func clip(s string, limit int) string {
	return strings.ToValidUTF8(s[:min(limit, len(s))], "?")
}

func orDefault(v, def int) uint32 {
	if v == 0 {
		return uint32(def)
	}
	return uint32(v)
}

// decoder decodes an option's data. failed is set if the data is too short.
type decoder struct {
	b      []byte
	failed bool
}

// take returns the next n bytes, or returns nil and sets failed.
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

// str decodes a string, which its length precedes.
func (d *decoder) str() string {
	n := d.u32()
	if n > maxNameLen {
		d.failed = true
	}
	return string(d.take(int(n)))
}

// done reports whether decoding has succeeded and no data is left.
func (d *decoder) done() bool { return !d.failed && len(d.b) == 0 }
