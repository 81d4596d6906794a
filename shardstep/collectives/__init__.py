"""What travels between ranks, and nothing about why.

    wire          the one file that touches torch.distributed: connections, messages, a cut
    neighbours    ranks of one machine, and what they offer one another instead of messages
    reading       their memory, read in place
    lines         pipes between them
    group         the door for one model: buffers and small control messages; a fingerprint of every collective
    pending       what is on its way
    records       the fingerprint, and the latest collectives behind it
    whereabouts   which part of the training this rank is in
    watch         the side channel: who failed, died, ended, or does not arrive
    heard         what a rank has heard on it, and what follows
    news          what it carries
    ends          how a process hears that it ends

No object collectives (they unpickle what peers send): small data travels as integers or as JSON bytes of
limited length. These rooms never decide what to send, and never listen beyond loopback on their own.
"""

from shardstep.collectives.ends import tell_failure as tell_failure
from shardstep.collectives.group import BUILDING as BUILDING
from shardstep.collectives.group import Group as Group
from shardstep.collectives.group import disconnect as disconnect
from shardstep.collectives.pending import Announcement as Announcement
from shardstep.collectives.pending import Pending as Pending
from shardstep.collectives.pending import Traffic as Traffic
from shardstep.collectives.whereabouts import Whereabouts as Whereabouts
from shardstep.collectives.wire import ProcessGroup as ProcessGroup
from shardstep.collectives.wire import connect_local as connect_local
